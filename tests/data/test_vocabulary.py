"""Vocabularies: ids, round trips, and what is said about a bad model file."""

import hashlib
import json
import pickle
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from axrepro.core import UserError
from axrepro.data import Bytes, SentencePiece
from axrepro.data.vocabulary import HuggingFace

TEXT = "the quick brown fox jumps over a lazy dog while seven wizards pack my box with five dozen jugs"


@pytest.fixture(scope="module")
def train(tmp_path_factory):
    trainer = pytest.importorskip("sentencepiece", reason="needs the extra `text`").SentencePieceTrainer
    folder = tmp_path_factory.mktemp("sentencepiece")
    rng = np.random.default_rng(0)
    sentences = [" ".join(rng.choice(TEXT.split(), 8)) for _ in range(200)]

    def run(name: str, **ids: int) -> str:
        prefix = folder / name
        if not prefix.with_suffix(".model").exists():
            trainer.train(
                sentence_iterator=iter(sentences), model_prefix=str(prefix), vocab_size=40, minloglevel=2, **ids
            )
        return f"{prefix}.model"

    return run


def test_byte_ids_are_those_of_seqio():
    vocabulary = Bytes()
    assert (vocabulary.size, vocabulary.pad_id, vocabulary.eos_id) == (259, 0, 1)
    assert vocabulary.encode(b"\x00A\xff").tolist() == [3, 68, 258]
    assert vocabulary.encode("é").tolist() == [0xC3 + 3, 0xA9 + 3]
    assert vocabulary.encode(b"A").dtype == np.int32


@settings(deadline=None)
@given(st.text())
def test_bytes_round_trip_any_text(text):
    assert Bytes().decode(Bytes().encode(text)) == text


@settings(deadline=None)
@given(st.binary())
def test_bytes_decode_what_is_not_utf8_with_replacement(raw):
    assert Bytes().decode(Bytes().encode(raw)) == raw.decode(errors="replace")


def test_bytes_decode_skips_special_ids_and_goes_on():
    assert Bytes().decode([1, 75, 0, 2, 108, 1, 36]) == "Hi!"


def test_sentencepiece_gives_the_ids_and_text_of_the_library(train):
    import sentencepiece

    path = train("t5", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    theirs, ours = sentencepiece.SentencePieceProcessor(model_file=path), SentencePiece(path)
    text = "seven lazy wizards jump over the fox"
    ids = ours.encode(text)
    assert ids.tolist() == theirs.encode(text)
    assert ours.encode(text.encode()).tolist() == ids.tolist()
    assert ours.decode(ids) == theirs.decode(ids.tolist()) == text
    assert ours.decode([0, 1, *ids.tolist(), 1, 0]) == text
    assert (ours.size, ours.pad_id, ours.eos_id) == (40, 0, 1)


def test_sentencepiece_without_padding_pads_with_the_end_id(train):
    vocabulary = SentencePiece(train("plain"))
    assert vocabulary.eos_id == vocabulary.pad_id == 2


def test_sentencepiece_without_an_end_id_is_refused_by_name(train):
    path = train("endless", eos_id=-1)
    with pytest.raises(UserError, match=r"endless\.model has no end-of-sentence id"):
        SentencePiece(path).encode("fox")


def test_a_missing_model_is_named(tmp_path):
    pytest.importorskip("sentencepiece", reason="needs the extra `text`")
    with pytest.raises(UserError, match=r"no SentencePiece model at .*gone\.model"):
        _ = SentencePiece(str(tmp_path / "gone.model")).size


@pytest.mark.parametrize("content", [b"", b"this is no model " * 50])
def test_a_file_that_is_no_model_is_named(tmp_path, content):
    pytest.importorskip("sentencepiece", reason="needs the extra `text`")
    path = tmp_path / "wrong.model"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"wrong\.model is no SentencePiece model"):
        _ = SentencePiece(str(path)).size


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)  # what Python itself does to block an import
    with pytest.raises(UserError, match=r"pip install axrepro\[text\]"):
        _ = SentencePiece("some.model").size


def test_extra_ids_stand_above_the_bytes_and_for_no_text():
    vocabulary = Bytes(extra_ids=3)
    assert vocabulary.size == 262
    assert vocabulary.decode([261, 68, 259, 258]) == "A\ufffd"
    with pytest.raises(UserError, match=r"Bytes\.extra_ids=-1"):
        Bytes(extra_ids=-1)


def test_extra_ids_stand_above_those_of_a_sentencepiece_model(train):
    path = train("plain")
    with_sentinels, plain = SentencePiece(path, extra_ids=2), SentencePiece(path)
    assert with_sentinels.size == plain.size + 2 == 42
    ids = plain.encode("lazy fox")
    assert with_sentinels.encode("lazy fox").tolist() == ids.tolist()
    assert with_sentinels.decode([41, *ids, 40]) == "lazy fox"


def test_a_fingerprint_is_that_of_the_model_and_not_of_its_path(train, tmp_path):
    path = train("plain")
    copy = tmp_path / "copy.model"
    copy.write_bytes(Path(path).read_bytes())
    digest = hashlib.sha256(copy.read_bytes()).hexdigest()
    assert SentencePiece(path).fingerprint == SentencePiece(str(copy)).fingerprint == digest
    others = {SentencePiece(train("t5", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)).fingerprint, Bytes().fingerprint}
    assert len({digest, *others}) == 3
    # it is written into tokenised files, so it may not change
    assert (
        Bytes().fingerprint
        == Bytes(extra_ids=5).fingerprint
        == ("a43ce992dc37bc5c3854f9f4316e368ec897773142a3a9a8470f2b3ed8f2d781")
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A byte-level tokenizer as transformers writes it, which cuts, pads and puts a token first unasked."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra `data`")
    transformers = pytest.importorskip("transformers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    library.train_from_iterator([TEXT] * 3, trainer)
    library.add_special_tokens(["<|endoftext|>", "<|im_end|>", "[PAD]"])
    end = ("<|endoftext|>", library.token_to_id("<|endoftext|>"))
    library.post_processor = tokenizers.processors.TemplateProcessing(single=f"{end[0]} $A", special_tokens=[end])
    library.enable_truncation(5)
    library.enable_padding(length=9)
    folder = tmp_path_factory.mktemp("huggingface")
    library.save(str(folder / "bare.json"))
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=library, eos_token="<|endoftext|>", pad_token=transformers.AddedToken("[PAD]")
    )
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(folder)


@settings(deadline=None)
@given(text=st.text())
def test_huggingface_gives_the_ids_and_text_of_transformers_and_returns_any_text(folder, theirs, text):
    vocabulary = HuggingFace(str(folder))
    for some in (text, f"{TEXT} {text}<|im_end|> lazy"):
        ids = vocabulary.encode(some)
        assert ids.dtype == np.int32
        assert ids.tolist() == theirs(some, add_special_tokens=False)["input_ids"]
        assert vocabulary.encode(some.encode()).tolist() == ids.tolist()
        expected = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert vocabulary.decode(ids) == expected == some.replace("<|im_end|>", "")


def test_huggingface_has_the_special_ids_that_are_named_beside_it_or_in_the_config(folder, theirs):
    named = HuggingFace(str(folder / "tokenizer.json"))
    assert (named.size, named.eos_id, named.pad_id) == (len(theirs), theirs.eos_token_id, theirs.pad_token_id)
    chat = HuggingFace(str(folder / "bare.json"), eos="<|im_end|>", pad="<|endoftext|>")
    assert [chat.eos_id, chat.pad_id] == theirs.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    alone = folder.with_name("alone")
    alone.mkdir(exist_ok=True)
    (alone / "tokenizer.json").write_bytes((folder / "bare.json").read_bytes())
    ended = HuggingFace(str(alone), eos="<|im_end|>")
    assert ended.pad_id == ended.eos_id == chat.eos_id
    with pytest.raises(UserError, match=r"does not say which token ends a document; set eos \(.*: <\|endoftext\|>, "):
        _ = HuggingFace(str(alone)).eos_id
    with pytest.raises(UserError, match=r"has no token '<\|imend\|>', its eos; did you mean '<\|im_end\|>'"):
        _ = HuggingFace(str(alone), eos="<|imend|>").eos_id


def test_huggingface_decodes_no_special_tokens_and_no_ids_beyond_its_own(folder):
    vocabulary = HuggingFace(str(folder))
    ids = vocabulary.encode("lazy fox").tolist()
    assert vocabulary.decode([vocabulary.eos_id, -1, *ids, vocabulary.size + 7, vocabulary.pad_id]) == "lazy fox"


def test_special_tokens_in_documents_can_be_text_like_any_other(folder):
    vocabulary = HuggingFace(str(folder), parse_special=False)
    ids = vocabulary.encode("a<|endoftext|>b")
    assert vocabulary.eos_id not in ids
    assert vocabulary.decode(ids) == "a<|endoftext|>b"
    assert HuggingFace(str(folder)).encode("a<|endoftext|>b").tolist()[1] == vocabulary.eos_id


def test_the_size_of_a_vocabulary_with_gaps_is_beyond_its_last_id(folder, tmp_path):
    model = json.loads((folder / "bare.json").read_text())
    for token in model["added_tokens"]:
        token["id"] += 50
    model["model"]["vocab"] = {text: id_ if id_ < 270 else id_ + 20 for text, id_ in model["model"]["vocab"].items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))
    vocabulary = HuggingFace(str(tmp_path), eos="<|im_end|>")
    assert vocabulary.size > max(vocabulary.encode(TEXT).max(), vocabulary.eos_id) >= 290


def test_threads_and_processes_share_a_vocabulary(folder):
    vocabulary = HuggingFace(str(folder))
    texts = [f"{TEXT} {i}" for i in range(200)]
    expected = [vocabulary.encode(text).tolist() for text in texts]
    with ThreadPoolExecutor(8) as pool:
        assert [ids.tolist() for ids in pool.map(vocabulary.encode, texts)] == expected
    code = "import pickle, sys; v, t = pickle.load(sys.stdin.buffer); print(v.encode(t).tolist(), v.fingerprint)"
    sent = pickle.dumps((vocabulary, texts[7]))
    assert len(sent) < 1000  # the path, not the tokenizer
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], input=sent, capture_output=True, cwd=root, timeout=120)
    assert done.stdout.decode().strip() == f"{expected[7]} {vocabulary.fingerprint}", done.stderr
    assert vocabulary.fingerprint == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no tokenizer.json at"), ("{}", "is no tokenizer.json"), ("no json", "is no tokenizer.json")],
)
def test_a_wrong_tokenizer_file_is_named(content, message, tmp_path):
    pytest.importorskip("tokenizers", reason="needs the extra `data`")
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=message):
        HuggingFace(str(tmp_path)).encode("a")


def test_a_wrong_config_beside_a_tokenizer_is_named(folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((folder / "bare.json").read_bytes())
    for content in ("{", "[]", '{"eos_token": {}}'):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(UserError, match=r"tokenizer_config\.json is no tokenizer_config\.json"):
            HuggingFace(str(tmp_path)).encode("a")


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Path:
    """An empty cache of the hub, and no network."""
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    reached = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: reached.append(address))
    yield tmp_path
    assert not reached


def test_a_path_is_never_looked_up_on_the_hub(hub):
    with pytest.raises(UserError, match=r"there is no tokenizer\.json \(hf://OWNER/NAME fetches one\) at gpt2"):
        HuggingFace("gpt2").encode("a")
    assert not list(hub.iterdir())


def test_a_name_on_the_hub_without_network_is_one_line(hub):
    with pytest.raises(
        UserError, match="cannot get the tokenizer hf://openai/gpt2 from the Hugging Face hub"
    ) as caught:
        HuggingFace("hf://openai/gpt2").encode("a")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="names no repository of the hub"):
        HuggingFace("hf://a/b/c").encode("a")


def test_a_name_on_the_hub_is_read_from_the_cache(hub, folder):
    snapshot = hub / "models--some--model/snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (hub / "models--some--model/refs").mkdir()
    (hub / "models--some--model/refs/main").write_text("0" * 40)
    (snapshot / "tokenizer.json").write_bytes((folder / "bare.json").read_bytes())
    vocabulary = HuggingFace("hf://some/model", eos="<|im_end|>")
    assert vocabulary.encode(TEXT).tolist() == HuggingFace(str(folder)).encode(TEXT).tolist()
    assert HuggingFace("hf://some/model@main", eos="<|im_end|>").eos_id == vocabulary.eos_id


def test_a_missing_tokenizers_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"pip install axrepro\[data\]"):
        _ = HuggingFace("some.json").size
