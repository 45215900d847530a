"""From metadata to batches: records → pictures → latent cache → the batches of every step."""

from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.batches.data_config import DataConfig, SourceConfig
from mmdit.data.batches.latent_batches import LatentBatches
from mmdit.data.cache.latent_cache import LatentCache, open_cache
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.cache.writer import CacheWriter
from mmdit.data.dataset.buckets import BucketingConfig, VideoConfig, target_sizes
from mmdit.data.dataset.frames import PreprocessConfig
from mmdit.data.dataset.records import Record, read_records

__all__ = [
    "BatchPlan",
    "BucketingConfig",
    "CacheManifest",
    "CacheWriter",
    "DataConfig",
    "SourceConfig",
    "LatentBatches",
    "LatentCache",
    "PreprocessConfig",
    "Record",
    "VideoConfig",
    "open_cache",
    "read_records",
    "target_sizes",
]
