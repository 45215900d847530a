"""From metadata to batches: records → pictures → latent cache → the batches of every step."""

from mmdit.data.batches import BatchPlan, DataConfig, LatentBatches
from mmdit.data.buckets import BucketingConfig, VideoConfig, target_sizes
from mmdit.data.cache import CacheWriter, LatentCache, open_cache
from mmdit.data.frames import PreprocessConfig
from mmdit.data.manifest import CacheManifest
from mmdit.data.records import Record, read_records

__all__ = [
    "BatchPlan", "BucketingConfig", "CacheManifest", "CacheWriter", "DataConfig", "LatentBatches", "LatentCache",
    "PreprocessConfig", "Record", "VideoConfig", "open_cache", "read_records", "target_sizes",
]  # fmt: skip
