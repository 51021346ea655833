"""Datasets in the files of TensorFlow Datasets, against its own readers and with planted faults."""

import io
import os
import pickle
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from axrepro.core import UserError
from axrepro.data.records import BadRecord
from axrepro.data.sources.tfds import Tfds

FORMATS = ("tfrecord", "array_record")
ROOT = Path(__file__).resolve().parents[2]


def generated(count: int, seed: int) -> list[dict]:
    """What the builder below was given."""
    rng = np.random.default_rng(seed)
    return [
        {
            "image": rng.integers(0, 255, (2, 3, 3), np.uint8),
            "label": i % 3,
            "text": f"the text {i} é",
            "weights": rng.random(4).astype(np.float32),
            "clips": [{"still": rng.integers(0, 255, (2, 1, 3), np.uint8)} for _ in range(i % 2)],
            "nested": {"views": [rng.integers(0, 255, (2, 2, 3), np.uint8) for _ in range(i % 3)], "size": i},
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> dict:
    """A data_dir with the dataset `pictures` in three shards, for each format."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow_datasets as tfds

    class Pictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.2.0")

        def _info(self):
            views = tfds.features.Sequence(tfds.features.Image(shape=(2, 2, 3)))
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(num_classes=3),
                "text": tfds.features.Text(),
                "weights": tfds.features.Tensor(shape=(4,), dtype=np.float32),
                "clips": tfds.features.Sequence({"still": tfds.features.Image(shape=(2, 1, 3))}),
                "nested": tfds.features.FeaturesDict({"views": views, "size": np.int64}),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": enumerate(generated(37, 0)), "test": enumerate(generated(5, 1))}

        def _generate_examples(self):
            raise NotImplementedError

    folders = {}
    for file_format in FORMATS:
        folders[file_format] = str(tmp_path_factory.mktemp(file_format))
        builder = Pictures(data_dir=folders[file_format], file_format=file_format)
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=3))
    return folders


def shard(data_dir: str, number: int, split="train") -> Path:
    return Path(data_dir) / f"pictures/1.2.0/pictures-{split}.tfrecord-0000{number}-of-00003"


@pytest.fixture
def broken(prepared, tmp_path) -> str:
    """A copy of the TFRecord files to plant faults in."""
    shutil.copytree(prepared["tfrecord"], tmp_path / "copy")
    return str(tmp_path / "copy")


def starts(path: Path) -> list[int]:
    """Where each record of a TFRecord file starts."""
    data, found = path.read_bytes(), [0]
    while found[-1] < len(data):
        found.append(found[-1] + 16 + struct.unpack("<Q", data[found[-1] : found[-1] + 8])[0])
    return found[:-1]


def change(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


def failures(records) -> dict[int, str]:
    """What is said of each record that cannot be read."""
    found = {}
    for index in range(len(records)):
        try:
            records[index]
        except BadRecord as error:
            found[index] = str(error)
    return found


def pixels(encoded: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(encoded)))


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("split", ["train", "eval"])
def test_every_record_is_one_that_the_builder_was_given(prepared, file_format, split):
    records = Tfds(name="pictures", data_dir=prepared[file_format]).open(split)
    wanted = {example["text"].encode(): example for example in generated(37, 0) if split == "train"}
    wanted |= {example["text"].encode(): example for example in generated(5, 1) if split == "eval"}
    found = list(records)
    assert sorted(record["text"] for record in found) == sorted(wanted)
    for record in found:
        example = wanted[record["text"]]
        assert type(record["label"]) is int
        assert record["label"] == example["label"]
        assert type(record["image"]) is bytes
        np.testing.assert_array_equal(pixels(record["image"]), example["image"])
        assert record["weights"].dtype == np.float32
        np.testing.assert_array_equal(record["weights"], example["weights"])
        assert record["nested"]["size"] == example["nested"]["size"]
        stills = [pixels(still) for still in record["clips"]["still"]]
        np.testing.assert_array_equal(np.array(stills), np.array([clip["still"] for clip in example["clips"]]))
        views = [pixels(view) for view in record["nested"]["views"]]
        np.testing.assert_array_equal(np.array(views), np.array(example["nested"]["views"]))


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("split", ["train[:10%]", "train[5:20]", "train[-3:]", "test+train[30:]", "train[10:11]"])
def test_slices_hold_what_tensorflow_datasets_reads_for_them(prepared, file_format, split):
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(f"{prepared['tfrecord']}/pictures/1.2.0")
    config = tfds.ReadConfig(interleave_cycle_length=1)
    theirs = [example["text"] for example in tfds.as_numpy(builder.as_dataset(split=split, read_config=config))]
    records = Tfds(name="pictures", split=split, data_dir=prepared[file_format]).open("train")
    assert len(records) == len(theirs)
    assert [record["text"] for record in records] == theirs


@pytest.mark.parametrize("file_format", FORMATS)
def test_names_tell_the_file_and_the_number_there(prepared, file_format):
    whole = Tfds(name="pictures", data_dir=prepared[file_format]).open("train")
    part = Tfds(name="pictures", split="train[5:20]", data_dir=prepared[file_format]).open("train")
    names = [whole.name(i) for i in range(37)]
    assert len(set(names)) == 37
    assert [part.name(i) for i in range(15)] == names[5:20]
    assert names[0].endswith("-00000-of-00003 (record 0)")
    with pytest.raises(IndexError):
        whole[37]


@pytest.mark.parametrize("file_format", FORMATS)
def test_pickled_records_and_threads_read_the_same(prepared, file_format):
    records = Tfds(name="pictures", data_dir=prepared[file_format]).open("train")
    texts = [record["text"] for record in records]
    again = pickle.loads(pickle.dumps(records))
    with ThreadPoolExecutor(8) as pool:
        assert [record["text"] for record in pool.map(again.__getitem__, [*range(37)] * 5)] == texts * 5


@pytest.mark.parametrize("file_format", FORMATS)
def test_chosen_fields_are_kept_and_decoded_where_that_is_asked_for(prepared, file_format):
    source = Tfds(name="pictures", data_dir=prepared[file_format], fields=("image", "text"), decoded=("image",))
    for record in source.open("eval"):
        (example,) = (one for one in generated(5, 1) if one["text"].encode() == record["text"])
        assert record.keys() == {"image", "text"}
        np.testing.assert_array_equal(record["image"], example["image"])


def test_the_directory_of_a_version_stands_for_the_name(prepared):
    direct = Tfds(name=f"{prepared['tfrecord']}/pictures/1.2.0").open("train")
    named = Tfds(name="pictures:1.2.0", data_dir=prepared["tfrecord"]).open("train")
    assert [record["text"] for record in direct] == [record["text"] for record in named]


def test_tfrecords_are_read_without_tensorflow(prepared):
    code = f"""
import sys
from axrepro.data.sources.tfds import Tfds
records = Tfds(name="pictures", data_dir={prepared["tfrecord"]!r}).open("train")
print(len(records), records[3]["label"] in (0, 1, 2), "tensorflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "37 True False\n", done.stderr


def test_a_changed_byte_spoils_its_record_alone(broken):
    place = starts(shard(broken, 1))[4]
    change(shard(broken, 1), place + 40)
    records = Tfds(name="pictures", data_dir=broken).open("train")
    ((index, message),) = failures(records).items()
    assert records.name(index) == f"{shard(broken, 1)} (record 4)"
    assert message.startswith(records.name(index))
    assert "checksum of its data" in message


@pytest.mark.parametrize("byte", [0, 7, 9])
def test_a_changed_header_is_found_when_the_split_is_opened(broken, byte):
    change(shard(broken, 2), starts(shard(broken, 2))[3] + byte)
    with pytest.raises(BadRecord, match=r"00002-of-00003 \(record 3 of 1\d\): the checksum of its length"):
        Tfds(name="pictures", data_dir=broken).open("train")
    assert len(Tfds(name="pictures", data_dir=broken, split="train[:10%]").open("train")) == 4  # of another file


@pytest.mark.parametrize("kept", [5, 20])
def test_a_file_that_ends_early_is_refused_with_the_record(broken, kept):
    path = shard(broken, 0)
    *_, last = places = starts(path)
    path.write_bytes(path.read_bytes()[: last + kept])
    with pytest.raises(BadRecord, match=rf"00000-of-00003 \(record {len(places) - 1} of .* file ends"):
        Tfds(name="pictures", data_dir=broken).open("train")


def test_a_file_with_more_records_than_counted_is_refused(broken):
    path = shard(broken, 0)
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(UserError, match="holds more than the"):
        Tfds(name="pictures", data_dir=broken).open("train")


def test_a_record_that_is_no_example_is_named_whatever_its_checksum_says(prepared, broken):
    import tensorflow as tf

    path = shard(broken, 0, "test")
    count = len(starts(path))
    with tf.io.TFRecordWriter(str(path)) as writer:
        for _ in range(count):
            writer.write(b"\xff\xff not a proto")
    records = Tfds(name="pictures", data_dir=broken).open("eval")
    with pytest.raises(BadRecord, match=r"pictures-test.tfrecord-00000-of-00003 \(record 0\) cannot be read"):
        records[0]


def test_a_corrupt_array_record_is_named(prepared, tmp_path):
    shutil.copytree(prepared["array_record"], tmp_path / "copy")
    path = tmp_path / "copy/pictures/1.2.0/pictures-train.array_record-00001-of-00003"
    data = bytearray(path.read_bytes())
    data[3000] ^= 4  # the records begin at 2046, and zeros fill the file up to 128 kB
    path.write_bytes(data)
    (message,) = failures(Tfds(name="pictures", data_dir=str(tmp_path / "copy")).open("train")).values()
    assert message.startswith(str(path))


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_missing_file_is_named(prepared, tmp_path, file_format):
    shutil.copytree(prepared[file_format], tmp_path / "copy")
    (tmp_path / f"copy/pictures/1.2.0/pictures-train.{file_format}-00001-of-00003").unlink()
    with pytest.raises(UserError, match=r"pictures-train.*00001-of-00003 is missing"):
        Tfds(name="pictures", data_dir=str(tmp_path / "copy")).open("train")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "picture"}, "did you mean 'pictures'"),
        ({"name": "pictures:3.0.0"}, "it has pictures/1.2.0"),
        ({"name": "nothing_like_it_at_all_xyz"}, "set data_dir"),
        ({"name": "mnist"}, "not prepared .* tfds build mnist --data_dir="),
        ({"name": "/nowhere/at/all"}, "has no dataset_info.json"),
        ({"split": "tran"}, r"no split 'tran' .* it has train \(37 records\), test \(5 records\)"),
        ({"split": "train[:200%]"}, "no split"),
        ({"split": "train[50:60]"}, "no split"),
        ({"split": "train[3:3]"}, "is empty"),
        ({"fields": ("imag",)}, "did you mean 'image'"),
        ({"decoded": ("imag",)}, "did you mean 'image'"),
    ],
)
def test_wrong_input_is_refused_in_one_line_and_nothing_is_downloaded(prepared, fields, message):
    before = sorted(Path(prepared["tfrecord"]).rglob("*"))
    with pytest.raises(UserError, match=message) as error:
        Tfds(**{"name": "pictures", "data_dir": prepared["tfrecord"]} | fields).open("train")
    assert "\n" not in str(error.value)
    assert sorted(Path(prepared["tfrecord"]).rglob("*")) == before


def test_no_eval_split_is_said_so(prepared):
    with pytest.raises(UserError, match="has no eval split"):
        Tfds(name="pictures", eval_split=None, data_dir=prepared["tfrecord"]).open("eval")
