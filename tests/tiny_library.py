"""A made-up standard library of a few small packages, in the place of this Python's."""

import random

from headprune.evaluation.tasks import standard_library


def use_tiny_library(monkeypatch, folder, packages: int = 24) -> None:
    """Writes the library to `folder` and makes `standard_library` read it."""
    generator = random.Random(0)
    verbs, nouns = ("read", "write", "open", "close", "find"), ("file", "name", "line", "queue", "stream")
    for number in range(packages):
        lines = []
        for _ in range(20):
            verb, noun = generator.choice(verbs), generator.choice(nouns)
            lines.append(f"def {verb}_{noun}(self, {noun}):\n    return self.{verb}({noun}, {generator.randrange(10)})\n")
        package = folder / f"package{number}"
        package.mkdir(parents=True)
        for name in ("__init__.py", "part.py"):
            (package / name).write_text("\n".join(lines[:10] if name == "part.py" else lines[10:]))
    monkeypatch.setattr(standard_library.sysconfig, "get_path", lambda name: str(folder))
    monkeypatch.setattr(standard_library, "topic_documents", list)
    monkeypatch.setattr(standard_library, "PART_SIZE", 4000)
