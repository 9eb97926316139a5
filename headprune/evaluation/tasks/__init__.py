"""Tasks: data and a metric each; importing this package registers those that come with headprune."""

from headprune.evaluation.tasks.docstring_retrieval import DocstringRetrieval
from headprune.evaluation.tasks.standard_library_text import StandardLibraryText
from headprune.evaluation.tasks.task import Task, build_task, check_task, register_task, tasks

__all__ = ["DocstringRetrieval", "StandardLibraryText", "Task", "build_task", "check_task", "register_task", "tasks"]
