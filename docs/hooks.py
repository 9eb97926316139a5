"""What mkdocs calls while it builds: fills the generated parts of pages in (docs/generators),
and draws the pictures."""

from generators import fill, pictures
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File


def on_files(files, config, **_):
    for name, content in pictures().items():
        files.append(File.generated(config, f"pictures/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page, **_) -> str:
    try:
        return fill(markdown)
    except ValueError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error
