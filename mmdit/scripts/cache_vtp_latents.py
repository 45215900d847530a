"""Encode clips once: JSONL of frame folders or video files, or WebDataset tars → latent cache with
every frame. Resumable; `torchrun` shares work.

    mmdit cache-latents --config configs/t2v_vtp_256_smoke.yaml \\
        --meta_jsonl data/train_videos.jsonl \\
        --out_dir data/cache/my_clips

Video files are decoded at `video.fps` frames a second. Which frames a sample takes is decided when
training (`video.num_frames`, `video.frame_stride`), so stages of equal size share one cache.
"""

from mmdit.scripts import cache_vtp_images, run


def main(argv: list[str] | None = None) -> int:
    return cache_vtp_images.main(argv, media="video", doc=__doc__)


if __name__ == "__main__":
    run(main)
