"""Show at which noise levels a model needs its captions, beside the levels that its training and
its sampler visit.

    mmdit inspect-levels --checkpoint runs/mine --train_cache_dir data/cache/mine

At levels where captions say much, training must draw many times and the sampler must take fine
steps: set `flow_matching.shift`, `logit_std` and `train.sample_shift` accordingly. Latents with
more cells, more frames or more channels need more noise.
"""

from dataclasses import replace

from mmdit.data.batches.batch_plan import BatchPlan
from mmdit.data.batches.data_config import check_together
from mmdit.data.batches.latent_batches import LatentBatches
from mmdit.data.cache.latent_cache import open_cache
from mmdit.data.cache.manifest import CacheManifest
from mmdit.data.dataset.buckets import VideoConfig
from mmdit.diagnostics.caption_levels import caption_levels, format_levels
from mmdit.experiment.experiment_config import ExperimentConfig
from mmdit.experiment.load import load_pipeline
from mmdit.files import real_path
from mmdit.scripts import command_parser, friendly, run
from mmdit.scripts.listing import advised
from mmdit.scripts.parsers import at_least
from mmdit.training.pipeline import SampleSettings


def of_clips(video: VideoConfig) -> VideoConfig:
    """Return the section `video` without steps on single frames, unless there are no others: so
    clips are measured if any are drawn."""
    return video if video.image_fraction == 1 else replace(video, image_fraction=0.0)


def prefix_of(config: ExperimentConfig, cache_dir: str) -> str:
    """Return what training puts in front of the captions of a cache."""
    folder = real_path(cache_dir)
    prefixes = (s.caption_prefix for s in config.data.sources if real_path(s.path) == folder)
    return next(prefixes, "")


def main(argv: list[str] | None = None) -> int:
    parser = command_parser(__doc__)
    parser.add_argument("--checkpoint", required=True, help="run, checkpoint or export")
    parser.add_argument("--train_cache_dir", required=True, help="the cache whose items are read")
    parser.add_argument(
        "--count", type=at_least(1, 1 << 16), default=64, help="samples that are measured [64]"
    )
    parser.add_argument("--batch_size", type=at_least(1, 1 << 16), default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("overrides", nargs="*", help="section.key=value over the stored config")
    args = parser.parse_intermixed_args(argv)
    with friendly():
        pipeline, config = load_pipeline(args.checkpoint, args.device, overrides=args.overrides)
        learner, device = pipeline.learner, pipeline.device
        network = learner.model
        if learner.experts or network.conditioning != "none" or network.picture != "none":
            raise ValueError(
                f"{args.checkpoint} holds two experts, redraws small clips or continues pictures;"
                " only one network that draws from captions alone can be measured"
            )
        cache = open_cache(args.train_cache_dir)
        wanted = CacheManifest.of(
            pipeline.tokenizer, config.video, config.bucketing, config.preprocess
        )
        check_together([cache], wanted, config.model.patch)
        (batch,) = LatentBatches(
            cache,
            BatchPlan(cache, of_clips(config.video), args.count, config.seed),
            in_memory=False,
            captions=config.captions,
            crops=config.model.crop,
            tile=pipeline.tile and pipeline.tile[1:],
            prefix=prefix_of(config, args.train_cache_dir),
        ).step(0)
        sound = batch.latents.isfinite().flatten(1).all(1).tolist()
        if broken := [id for id, fine in zip(batch.ids, sound, strict=True) if not fine]:
            check = advised("verify-cache", "--cache_dir", args.train_cache_dir)
            raise ValueError(
                f"the latents of item {broken[0]!r} are not finite, and nothing can be measured on"
                f" them: {check} names its file"
            )
        with pipeline.autocast():
            levels = caption_levels(
                learner,
                batch.latents.to(device).float(),
                batch.captions,
                batch_size=args.batch_size,
                crops=batch.crops,
                places=batch.places,
            )
        sampler = SampleSettings.of(config.train).sampler
        print(format_levels(learner.objective, levels, batch.latents.shape[1], sampler))
    return 0


if __name__ == "__main__":
    run(main)
