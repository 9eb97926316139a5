"""What mkdocs calls while it builds: fills the generated parts of pages in (docs/generators)."""

from generators import fill
from mkdocs.exceptions import PluginError


def on_page_markdown(markdown: str, page, **_) -> str:
    try:
        return fill(markdown)
    except ValueError as error:
        raise PluginError(f"{page.file.src_uri}: {error}") from error
