"""Sources of images. A new kind is a file with a subclass of `Source`, and a line here."""

from vqbeam.configs import DataConfig
from vqbeam.pipelines.sources.source import RawImage, Source, Unit

__all__ = ["RawImage", "Source", "Unit", "open_source"]


def open_source(data: DataConfig) -> Source:
    """Returns the source that `data.source` names; imports its libraries."""
    match data.source.partition(":")[0]:
        case "folder":
            from vqbeam.pipelines.sources.folder import FolderSource

            return FolderSource(data)
        case "tfds":
            from vqbeam.pipelines.sources.tfds import TfdsSource

            return TfdsSource(data)
        case "glyphs":
            from vqbeam.pipelines.sources.glyphs import GlyphsSource

            return GlyphsSource(data)
    raise ValueError(data.source)
