"""Every image file is read correctly or named in a message; every command line is parsed or refused in one line."""

import contextlib
import importlib.util
import io
import logging
import resource
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SCRIPTS, in_child, in_turn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

FUZZ = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated():
    """A picture 4 wide and 2 high whose EXIF turns it upright: its left half, red, comes to lie above."""
    image = Image.new("RGB", (32, 16), "blue")
    image.paste("red", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    return encode(image, exif=exif)


def palette(**options):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    return encode(image, **options)


# Bytes of an image, its size in pixels, and the colour of its first pixel.
GOOD = {
    "one pixel": (encode(Image.new("RGB", (1, 1), (9, 8, 7))), (1, 1), (9, 8, 7)),
    "panorama": (encode(Image.new("RGB", (20000, 10), (1, 2, 3))), (20000, 10), (1, 2, 3)),
    "cmyk": (encode(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), (4, 4), (255, 0, 0)),
    "16 bit": (encode(Image.fromarray(np.full((4, 4), 0x8080, np.uint16))), (4, 4), (128, 128, 128)),
    "16 bit, white": (encode(Image.fromarray(np.full((4, 4), 65535, np.uint16))), (4, 4), (255, 255, 255)),
    "32 bit": (encode(Image.fromarray(np.full((4, 4), 257 * 200, np.int32)), "TIFF"), (4, 4), (200, 200, 200)),
    "grey": (encode(Image.new("L", (4, 4), 77)), (4, 4), (77, 77, 77)),
    "palette": (palette(), (4, 4), (10, 200, 30)),
    "palette, transparent": (palette(transparency=1), (4, 4), (255, 255, 255)),
    "half transparent": (encode(Image.new("RGBA", (4, 4), (0, 100, 255, 128))), (4, 4), (127, 177, 255)),
    "opaque": (encode(Image.new("RGBA", (4, 4), (1, 2, 3, 255))), (4, 4), (1, 2, 3)),
    "rotated": (rotated(), (16, 32), (255, 0, 0)),
    "transparent": (encode(Image.new("RGBA", (4, 4), (255, 0, 0, 0))), (4, 4), (255, 255, 255)),
    "grey, alpha": (encode(Image.new("LA", (4, 4), (0, 255))), (4, 4), (0, 0, 0)),
    "black and white": (encode(Image.new("1", (4, 4), 1)), (4, 4), (255, 255, 255)),
    "animated": (
        encode(
            Image.new("RGB", (4, 4), (255, 0, 0)),
            "GIF",
            save_all=True,
            append_images=[Image.new("RGB", (4, 4), (0, 0, 255))],
        ),
        (4, 4),
        (255, 0, 0),
    ),
}
PNG = encode(Image.fromarray(np.arange(48 * 48 * 3, dtype=np.uint8).reshape(48, 48, 3)))
BAD = {
    "empty": b"",
    "truncated": PNG[: len(PNG) // 2],
    "text": b"not an image",
    "bomb": encode(Image.new("1", (20000, 20000))),
}


@pytest.mark.parametrize(("kind", "name"), in_turn([(name,) for name in GOOD]))
def test_used_right(script, name):
    data, size, pixel = GOOD[name]
    image = script.open_image({"path": None, "bytes": data}, 48, 0)
    assert (image.mode, image.size) == ("RGB", size)
    np.testing.assert_allclose(image.getpixel((0, 0)), pixel, atol=1 if name == "half transparent" else 0)
    crop = script.crop_image(image, (32, 48), torch.Generator().manual_seed(0), False, True)
    assert crop.shape == (3, 32, 48)
    assert crop.dtype == torch.uint8


@pytest.fixture
def read(script, argv, monkeypatch, caplog):
    """The images of a folder as a run reads them, once its flags are checked."""
    monkeypatch.setattr(script, "log", logging.getLogger("data"))

    def read(folder, **flags):
        return script.read_instances(script.parse_args(argv(instance_data_dir=folder, **flags)))

    return read


@pytest.mark.parametrize("kind", ["lora"])
def test_broken_images_are_named_ten_at_once(read, capsys, tmp_path):
    """Of twelve that are damaged in four ways; a last one is whole, and one needs a package."""
    names = [f"{number:02}.{'heic' if number == 9 else 'png'}" for number in range(12)]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(list(BAD.values())[number % 4])
    (tmp_path / "whole.png").write_bytes(PNG)
    with pytest.raises(SystemExit) as end:
        read(tmp_path)
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert len(lines) == 1
    assert "error: --instance_data_dir: 12 of 13 images are broken: the image " in lines[0]
    for name in names[:10]:
        assert f"the image {tmp_path / name} cannot be read (" in lines[0]
    assert names[10] not in lines[0]
    assert lines[0].endswith("): repair or remove them; for HEIC: pip install pillow-heif")


def test_heic_is_read_where_its_package_is_installed(tmp_path, monkeypatch):
    """A script registers what is there when it is loaded, in each loader process too."""
    registered = []
    package = SimpleNamespace(register_heif_opener=lambda: registered.append("heif"))
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    spec = importlib.util.spec_from_file_location("script_with_heif", SCRIPTS["lora"])
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert registered == ["heif"]


@pytest.mark.parametrize("kind", ["lora"])
def test_what_is_no_image_is_passed_over(read, tmp_path):
    (tmp_path / "dog.PNG").write_bytes(PNG)
    (tmp_path / "dog.txt").write_text("a caption")
    (tmp_path / "metadata.txt").write_text("no metadata")
    (tmp_path / ".hidden.png").write_bytes(PNG)
    (tmp_path / "nested.png").mkdir()
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    assert read(tmp_path).images["instance"] == [tmp_path / "dog.PNG"]


@pytest.mark.parametrize("kind", ["full"])
@pytest.mark.parametrize(
    "caption", ["a \U0001f436 dog", "a\x00\x07\x1b[31m dog", "word " * 10_000, "", "\n\n", "\ufeffa dog"]
)
def test_captions(read, tmp_path, caption):
    """On one line, without the mark that some editors begin a file with; an empty one is none."""
    path = tmp_path / "dog.png"
    path.write_bytes(PNG)
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    plain = " ".join(caption.removeprefix("\ufeff").split())
    assert read(tmp_path).prompts["instance"] == [(plain or "a photo of sks dog",)]


@pytest.mark.parametrize("kind", ["lora"])
def test_a_caption_that_is_no_text_is_named(read, capsys, tmp_path):
    (tmp_path / "dog.png").write_bytes(PNG)
    (tmp_path / "dog.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(SystemExit) as end:
        read(tmp_path)
    assert end.value.code == 2
    assert f"error: {tmp_path / 'dog.txt'} is not UTF-8 text: " in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "text"), in_turn([('{"file_name": 3, "text": "a"}',), ("{",), ("",)]))
def test_metadata_that_is_none(read, tmp_path, capsys, text):
    (tmp_path / "dog.png").write_bytes(PNG)
    (tmp_path / "metadata.jsonl").write_text(text)
    with pytest.raises(SystemExit) as end:
        read(tmp_path, cache_dir=tmp_path / "cache")
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert len(lines) == 1 and ": error: --instance_data_dir" in lines[0]


@pytest.mark.parametrize("kind", ["full"])
def test_three_thousand_images_with_few_open_files(read, tmp_path):
    data = encode(Image.new("RGB", (2, 2), "red"))
    for number in range(3000):
        (tmp_path / f"{number:04}.png").write_bytes(data)

    def read_with_few():
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        assert list(read(tmp_path, resolution=16).sizes) == [(16, 16)] * 3000

    assert in_child(read_with_few) == 0


@given(data=st.data())
@settings(max_examples=60, **FUZZ)
def test_fuzz_images(lora, data):
    """Bytes that were an image: an RGB image or a ValueError that says so."""
    base = data.draw(st.sampled_from([PNG, *(bytes for bytes, _, _ in GOOD.values() if len(bytes) < 5000)]))
    place = data.draw(st.integers(0, len(base)))
    changed = base[:place] + data.draw(st.binary(max_size=12)) + base[place + data.draw(st.integers(0, 8)) :]
    try:
        image = lora.open_image({"path": None, "bytes": changed}, 64, 7)
    except ValueError as error:
        assert str(error).startswith("the image of row 7 cannot be read (")
        return
    size = data.draw(st.sampled_from([(16, 16), (32, 16), (16, 64)]))
    if image.width * image.height < 1_000_000:
        assert lora.crop_image(image, size, torch.Generator().manual_seed(0), False, True).shape == (3, *size)


NAMES = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=8)
ENDINGS = st.sampled_from(["", ".png", ".PNG", ".jpeg", ".txt", ".png.txt", ".png ", "."])
ENTRIES = st.dictionaries(
    st.builds("{}{}{}".format, st.sampled_from(["", "."]), NAMES, ENDINGS),
    st.sampled_from(["picture", "folder", "broken link", "link"]),
    max_size=6,
)


@given(entries=ENTRIES)
@settings(max_examples=20, **FUZZ)
def test_fuzz_folders(lora, tmp_path_factory, entries):
    """What is listed as an image can be opened, and no image is left out."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder.parent / "outside.png").write_bytes(PNG)
    for name, what in entries.items():
        with contextlib.suppress(FileExistsError, IsADirectoryError):  # "." and ".."
            if what == "picture":
                (folder / name).write_bytes(PNG)
            elif what == "folder":
                (folder / name).mkdir()
            else:
                (folder / name).symlink_to(folder.parent / ("outside.png" if what == "link" else "nowhere.png"))
    images = lora.list_images(folder)
    assert {lora.open_image(path, 48, 0).size for path in images} <= {(48, 48)}
    for path in folder.iterdir():
        openable = entries[path.name] in ("picture", "link") and path.name[0] != "."
        assert (path in images) == (openable and path.suffix.lower() in lora.IMAGE_SUFFIXES), path.name


FLAGS = ["--rank", "--seed", "--resolution", "--learning_rate", "--report_to", "--output_dir", "--logging_dir"]
FLAGS += [
    "--optimizer",
    "--aspect_ratio_buckets",
    "--use_aspect_ratio_buckets",
    "--prodigy_decouple",
    "--max_grad_norm",
]
FLAGS += ["--instance_prompt", "--with_prior_preservation", "--class_data_dir", "--class_prompt", "--lr_scheduler"]


@given(
    words=st.lists(
        st.one_of(
            st.sampled_from(FLAGS), st.text(max_size=8), st.sampled_from(["0", "-1", "nan", "1e999", "512", "1_0"])
        ),
        max_size=6,
    )
)
@settings(max_examples=60, **FUZZ)
def test_fuzz_flags(lora, tmp_path_factory, words):
    known = ["--pretrained_model_name_or_path", "x", "--instance_data_dir", str(tmp_path_factory.getbasetemp())]
    try:
        lora.parse_args(known + words)
    except SystemExit as end:
        assert end.code in (0, 2)
