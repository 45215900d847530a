"""Pictures come out as a viewer shows them, at the right size, cropped where the config says."""

import numpy as np
import pytest
from PIL import Image

from mmdit.config import ConfigError, decode
from mmdit.data.dataset.buckets import BucketingConfig, VideoConfig, choose_size, target_sizes
from mmdit.data.dataset.frames import PreprocessConfig, crop_box, cut, list_frames, load_image

SHIFTED = PreprocessConfig(crop="shifted", num_crops=4)


def colours(image):
    return np.asarray(load_image(image)).reshape(-1, 3).mean(0).round().astype(int).tolist()


def test_every_kind_of_file_becomes_the_colours_a_viewer_shows(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGBA", (4, 4), (200, 0, 0, 0)).save(path)
    assert colours(path) == [255, 255, 255]  # fully transparent: the white background
    Image.new("RGBA", (4, 4), (0, 0, 0, 128)).save(path)
    assert colours(path) == [127, 127, 127]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(path)
    assert colours(path) == [10, 20, 30]
    palette.save(path, transparency=1)
    assert colours(path) == [255, 255, 255]
    Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)).save(path)
    assert colours(path) == [128, 128, 128]  # 16 bits, not clipped at 255
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    red, green, blue = colours(tmp_path / "a.jpg")
    assert red > 240 and green < 15 and blue < 15


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (10, 20)


def test_truncated_file_is_an_error_not_a_grey_picture(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(ValueError, match="damaged picture: image file is truncated"):
        load_image(path)


@pytest.mark.parametrize("source", [(640, 480), (30000, 10), (10, 3000), (256, 256), (257, 255)])
@pytest.mark.parametrize("preprocess", [PreprocessConfig(), SHIFTED])
def test_crop_box_is_the_largest_of_the_targets_shape_inside_the_source(source, preprocess):
    target = (256, 128)
    for crop in range(preprocess.num_crops):
        left, top, right, bottom = crop_box(source, target, preprocess, "a", crop)
        assert 0 <= left < right <= source[0] and 0 <= top < bottom <= source[1]
        assert (right - left) / (bottom - top) == pytest.approx(2)
        assert right - left == pytest.approx(source[0]) or bottom - top == pytest.approx(source[1])
    assert cut(Image.new("RGB", source), (left, top, right, bottom), target).shape == (3, 128, 256)


def test_centre_crop_cuts_the_same_from_both_sides_and_the_middle_is_kept():
    left, top, right, bottom = crop_box((400, 100), (100, 100), PreprocessConfig(), "a")
    assert (left, right) == (150, 250)
    image = np.zeros((100, 400, 3), np.uint8)
    image[:, 150:250] = 200
    assert (cut(Image.fromarray(image), (left, top, right, bottom), (100, 100)) == 200).all()


def test_shifted_crops_depend_on_seed_id_and_number_only_and_lie_apart():
    boxes = [crop_box((400, 100), (100, 100), SHIFTED, "a", crop)[0] for crop in range(4)]
    assert boxes == [crop_box((400, 100), (100, 100), SHIFTED, "a", crop)[0] for crop in range(4)]
    assert min(abs(a - b) for i, a in enumerate(boxes) for b in boxes[:i]) > 20
    assert boxes[0] != crop_box((400, 100), (100, 100), PreprocessConfig("shifted", seed=1), "a")[0]
    assert boxes[0] != crop_box((400, 100), (100, 100), SHIFTED, "b")[0]
    lefts = [crop_box((400, 100), (100, 100), SHIFTED, str(i))[0] for i in range(500)]
    assert (
        130 < np.mean(lefts) < 170 and min(lefts) < 15 and max(lefts) > 285
    )  # uniform over the whole overhang
    near = [
        crop_box((400, 100), (100, 100), PreprocessConfig("shifted", 0.1), str(i))[0]
        for i in range(200)
    ]
    assert min(near) >= 135 and max(near) <= 165  # a tenth of it


def test_the_nearest_aspect_ratio_wins_and_size_breaks_ties():
    sizes = ((256, 256), (512, 512), (384, 192), (192, 384))
    assert choose_size((1000, 450), sizes) == (384, 192)
    assert choose_size((450, 1000), sizes) == (192, 384)
    assert choose_size((600, 600), sizes) == (512, 512)
    assert choose_size((300, 310), sizes) == (256, 256)  # 512 would upscale
    assert choose_size((30000, 10), sizes) == (384, 192)


def test_frames_are_in_natural_order_and_other_files_are_ignored(tmp_path):
    for name in ["10.png", "2.png", "1.JPG", "notes.txt", ".3.png"]:
        (tmp_path / name).touch()
    assert [path.name for path in list_frames(tmp_path)] == ["1.JPG", "2.png", "10.png"]


@pytest.mark.parametrize(
    "kind, values, told",
    [
        (PreprocessConfig, {"num_crops": 2}, "identical"),
        (PreprocessConfig, {"num_crops": 2, "crop": "shifted", "shift_fraction": 0}, "identical"),
        (PreprocessConfig, {"crop": "random"}, "must be one of"),
        (PreprocessConfig, {"shift_fraction": 1.5}, "from 0"),
        (BucketingConfig, {"enabled": True}, "is empty"),
        (BucketingConfig, {"buckets": [[64, 64], [64, 64]]}, "remove one"),
        (VideoConfig, {"num_frames": 0}, "greater than 0"),
        (VideoConfig, {"image_fraction": 0.5}, "num_frames is 1"),
    ],
)
def test_impossible_settings_are_refused_with_their_path(kind, values, told):
    with pytest.raises(ConfigError, match=told):
        decode(kind, values)


def test_sizes_must_be_multiples_of_the_downsampling():
    with pytest.raises(
        ConfigError, match="video.width, video.height: is 250x128.*nearest is 256x128"
    ):
        target_sizes(VideoConfig(250, 128), BucketingConfig(), 16)
    with pytest.raises(ConfigError, match=r"bucketing.buckets\[1\]"):
        target_sizes(VideoConfig(), BucketingConfig(True, buckets=((64, 64), (64, 40))), 16)
    assert target_sizes(VideoConfig(250, 250), BucketingConfig(True, buckets=((64, 64),)), 16) == (
        (64, 64),
    )
