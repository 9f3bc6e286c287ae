"""Sources of images. A new kind takes a file with a subclass of `Source` and a case here."""

from vqbeam.configs import DataConfig
from vqbeam.pipelines.sources.source import RawImage, Source, Unit

__all__ = ["RawImage", "Source", "Unit", "open_source"]


def open_source(data: DataConfig) -> Source:
    """Returns the source that `data.source` names, whose libraries are imported only now."""
    match data.source.partition(":")[0]:
        case "folder":
            from vqbeam.pipelines.sources.folder import FolderSource

            return FolderSource(data)
        case "parquet":
            from vqbeam.pipelines.sources.files.parquet import ParquetSource

            return ParquetSource(data)
        case "hf":
            from vqbeam.pipelines.sources.files.parquet import HubSource

            return HubSource(data)
        case "webdataset":
            from vqbeam.pipelines.sources.files.webdataset import WebdatasetSource

            return WebdatasetSource(data)
        case "tfrecord":
            from vqbeam.pipelines.sources.files.tfrecord import TfrecordSource

            return TfrecordSource(data)
        case "array":
            from vqbeam.pipelines.sources.files.arrays import ArraySource

            return ArraySource(data)
        case "tfds":
            from vqbeam.pipelines.sources.tfds import TfdsSource

            return TfdsSource(data)
        case "glyphs":
            from vqbeam.pipelines.sources.glyphs import GlyphsSource

            return GlyphsSource(data)
    raise ValueError(data.source)
