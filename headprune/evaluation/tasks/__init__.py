"""Tasks: data and a metric each; importing this package registers those that come with headprune."""

from headprune.evaluation.tasks.chat import Chat
from headprune.evaluation.tasks.docstring_retrieval import DocstringRetrieval
from headprune.evaluation.tasks.image_classification import ImageClassification
from headprune.evaluation.tasks.masked_text import MaskedText
from headprune.evaluation.tasks.question_answering import QuestionAnswering
from headprune.evaluation.tasks.retrieval import RetrievalOfPairs
from headprune.evaluation.tasks.speech_recognition import SpeechRecognition
from headprune.evaluation.tasks.standard_library_text import StandardLibraryText
from headprune.evaluation.tasks.task import (
    Task,
    build_task,
    check_task,
    check_task_options,
    named_task,
    register_task,
    task_defaults,
    task_options,
    tasks,
)
from headprune.evaluation.tasks.text import Text
from headprune.evaluation.tasks.text_classification import TextClassification
from headprune.evaluation.tasks.text_to_text import TextToText
from headprune.evaluation.tasks.token_classification import TokenClassification

__all__ = [
    "Chat", "DocstringRetrieval", "ImageClassification", "MaskedText", "QuestionAnswering", "RetrievalOfPairs",
    "SpeechRecognition", "StandardLibraryText", "Task", "Text", "TextClassification", "TextToText", "TokenClassification",
    "build_task", "check_task", "check_task_options", "named_task", "register_task", "task_defaults", "task_options", "tasks",
]  # fmt: skip
