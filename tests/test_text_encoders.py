"""Text encoders: what a caption means must not depend on its neighbours, the rank, the padding or
what was read before."""

import json
import logging
import random
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmdit import config as config_module
from mmdit.config import ConfigError
from mmdit.interfaces import TextEncoder
from mmdit.nn.attention import attend
from mmdit.text_encoders import (
    ByteLevelConfig,
    HashConfig,
    HuggingFaceConfig,
    TextEncoderConfig,
    build_text_encoder,
)
from mmdit.text_encoders import byte_level as byte_level_module
from mmdit.text_encoders import words as words_module
from mmdit.text_encoders.byte_level import WORD_BYTES, byte_rows, side_by_side, spell
from mmdit.text_encoders.words import split_words
from tests.helpers import warm
from tests.helpers.thorough import thorough

try:
    import transformers
except ImportError:
    transformers = None

CAPTIONS = ["a red star", "", "blue ball on gray", "left drifts a red red ball", " \n\t "]
LENGTHS = [3, 0, 4, 6, 0]


@pytest.fixture(scope="session", autouse=True)
def quiet():
    if transformers is not None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()


# ── tiny checkpoints of the library's own classes ─────────────────────────────────────────────────
VOCABULARY = [
    "<pad>",
    "</s>",
    "<unk>",
    "a",
    "red",
    "blue",
    "star",
    "ball",
    "on",
    "gray",
    "drifts",
    "left",
]
T5 = {
    "vocab_size": 32,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "num_decoder_layers": 1,
}
TOWER = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
CLIP_TEXT = {
    **TOWER,
    "max_position_embeddings": 20,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
VISION = {
    **{key: value for key, value in TOWER.items() if key != "vocab_size"},
    "image_size": 32,
    "patch_size": 16,
}


def make_t5():
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))


def make_umt5():
    return transformers.UMT5ForConditionalGeneration(transformers.UMT5Config(**T5))


def make_t5gemma():
    if not hasattr(transformers, "T5GemmaConfig"):
        pytest.skip("this version of transformers has no T5Gemma")
    part = {**TOWER, "num_key_value_heads": 1, "head_dim": 8}
    return transformers.T5GemmaForConditionalGeneration(
        transformers.T5GemmaConfig(encoder=part, decoder=part, vocab_size=32)
    )


def make_clip():
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=CLIP_TEXT, vision_config=VISION)
    )


def make_clip_text():
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP_TEXT))


def make_siglip():
    return transformers.SiglipModel(
        transformers.SiglipConfig(text_config=CLIP_TEXT, vision_config=VISION)
    )


def make_bert():
    return transformers.BertModel(transformers.BertConfig(**TOWER, max_position_embeddings=20))


def make_roberta():
    config = transformers.RobertaConfig(**TOWER, max_position_embeddings=20, pad_token_id=0)
    return transformers.RobertaModel(config)


MAKERS = {
    "t5": make_t5,
    "umt5": make_umt5,
    "t5gemma": make_t5gemma,
    "clip": make_clip,
    "clip_text": make_clip_text,
    "siglip": make_siglip,
    "bert": make_bert,
    "roberta": make_roberta,
}


def save_tokenizer(folder, words=tuple(VOCABULARY)):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=64, **names
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """name → (folder, the whole model it was saved from)."""
    if transformers is None:
        pytest.skip("transformers is not installed")
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(3)
            model = MAKERS[name]().eval()
            for (
                parameter
            ) in model.parameters():  # default initial values are too small to show a mistake
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.3)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            save_tokenizer(folder)
            made[name] = (str(folder), model)
        return made[name]

    return get


def hf(folder, **keys):
    return build_text_encoder(HuggingFaceConfig(name_or_path=folder, **{"max_length": 16, **keys}))


ENCODERS = ["byte_level", "hash", "hf_frozen", "hf_trained"]


@pytest.fixture(params=ENCODERS)
def build(request, checkpoint):
    def make(max_length=16):
        torch.manual_seed(0)
        if request.param == "byte_level":
            return build_text_encoder(ByteLevelConfig(dim=32, num_heads=2, max_length=max_length))
        if request.param == "hash":
            return build_text_encoder(HashConfig(dim=32, max_length=max_length))
        return hf(checkpoint("t5")[0], freeze=request.param == "hf_frozen", max_length=max_length)

    return make


@pytest.fixture
def encoder(build):
    return build()


def test_more_blocks_than_any_machine_holds_are_refused():
    with pytest.raises(ConfigError, match="depth: is 1000000; must be at most 10000"):
        ByteLevelConfig(depth=10**6)


# ── facts about every encoder ─────────────────────────────────────────────────────────────────────
def test_the_interface(encoder):
    assert isinstance(encoder, nn.Module) and isinstance(encoder, TextEncoder)
    text = encoder(CAPTIONS)
    assert text.embeddings.shape == (*text.valid.shape, encoder.dim)
    assert text.embeddings.dtype == torch.float32 and text.valid.dtype == torch.bool
    assert text.embeddings.isfinite().all()


def test_an_empty_caption_has_no_valid_token(encoder):
    text = encoder(CAPTIONS)
    markers = text.valid.sum(1)[0] - 3  # </s> for hf
    assert text.valid.sum(1).tolist() == [
        length + int(markers) if length else 0 for length in LENGTHS
    ]
    assert text.valid.shape[1] == max(LENGTHS) + markers  # the longest of the batch, not max_length
    nothing = encoder(["", " "])
    assert (
        nothing.valid.shape == (2, 1)
        and not nothing.valid.any()
        and nothing.embeddings.isfinite().all()
    )


def test_valid_tokens_come_first_and_padding_is_zero(encoder):
    text = encoder(CAPTIONS)
    assert torch.equal(text.valid, text.valid.sort(dim=1, descending=True).values)
    assert (text.embeddings[~text.valid] == 0).all() and (text.embeddings[text.valid] != 0).any(
        dim=1
    ).all()


def test_neighbours_and_padding_change_nothing(encoder):
    together = encoder(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        alone = encoder([caption])
        ours = together.embeddings[i][together.valid[i]]
        torch.testing.assert_close(alone.embeddings[0][alone.valid[0]], ours, rtol=1e-5, atol=1e-6)


def test_words_and_their_order_are_told_apart(encoder):
    captions = ["a red ball on gray", "a gray ball on red", "a blue ball on gray"]
    text = encoder(captions)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (text.embeddings[i] - text.embeddings[j]).abs().max() > 0.05
    swapped = encoder(["red blue", "blue red"]).embeddings
    assert not torch.allclose(
        swapped[0, 0], swapped[1, 1], atol=1e-3
    )  # the same word at another place


def test_calls_repeat_whatever_was_read_between(encoder):
    encoder.train()  # dropout must not make a resumed run differ
    first = encoder(CAPTIONS).embeddings
    with torch.inference_mode():
        encoder([f"other words {i}" for i in range(5)])
    assert torch.equal(encoder(CAPTIONS).embeddings, first)


def test_what_was_read_while_sampling_serves_training(encoder):
    with torch.inference_mode():
        encoder(CAPTIONS)
    text = encoder(CAPTIONS)
    linear = nn.Linear(encoder.dim, 1)
    linear(text.embeddings).sum().backward()
    assert linear.weight.grad.abs().max() > 0


def test_it_moves_with_the_module(encoder):
    holder = nn.ModuleDict({"text": encoder})
    assert all(not isinstance(buffer, nn.Parameter) for buffer in encoder.buffers())
    text = holder.to("cpu")["text"](CAPTIONS)
    assert text.embeddings.device.type == text.valid.device.type == "cpu"
    if torch.cuda.is_available():
        moved = holder.to("cuda")["text"](CAPTIONS)
        assert moved.embeddings.is_cuda and moved.valid.is_cuda
        torch.testing.assert_close(moved.embeddings.cpu(), text.embeddings, rtol=1e-3, atol=1e-3)


def test_truncation_is_reported_once(build, caplog):
    encoder = build(max_length=5)
    with caplog.at_level(logging.WARNING):
        text = encoder(["a red star", "a red red red red red red ball"])
        encoder(["a red red red red red red ball"])
    assert text.valid.sum(1).max() == 5
    messages = [
        record.getMessage() for record in caplog.records if "max_length" in record.getMessage()
    ]
    assert (
        len(messages) == 1
        and " 5" in messages[0]
        and (" 8 " in messages[0] or " 9 " in messages[0])
    )
    assert text.valid[0].sum() < 5


# ── words ─────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "chunk, parts",
    [
        ("Red,", ([], ["red"], [","])),
        ('("left-moving"', (["(", '"'], ["left-moving"], ['"'])),
        ("3.5", ([], ["3.5"], [])),
        ("...", ([".", ".", "."], [], [])),
        ("cafe\u0301", ([], ["caf\u00e9"], [])),  # composed
        ("नीला।", ([], ["नीला"], ["।"])),  # vowel signs are no punctuation
        ("红色abc猫。", ([], ["红", "色", "abc", "猫"], ["。"])),
        ("🙂", ([], ["🙂"], [])),
        ("\ud83d", (["?"], [], [])),  # half an emoji, from broken JSON
    ],
)
def test_words_of_many_languages(chunk, parts):
    assert split_words(chunk) == parts


def test_spelling_is_complete():
    for chunk in [
        "red",
        "Donaudampfschifffahrtsgesellschaft",
        "неоновый",
        "éééééééééé",
        "(x)",
        "a" * 50,
        "🙂🙂🙂🙂🙂🙂",
    ]:
        pieces = spell(chunk)
        assert "".join(pieces) == chunk.lower() and all(
            0 < len(piece.encode()) <= WORD_BYTES for piece in pieces
        )
    rows = byte_rows(["ab", "ba", "a", "a" * 16])
    assert rows.shape == (4, WORD_BYTES) and len({tuple(row.tolist()) for row in rows}) == 4
    assert (
        rows[0, 0] == rows[2, 0] != rows[1, 1] and (rows[2, 1:] == 0).all()
    )  # a byte's row depends on its place
    assert rows.max() < 1 + 256 * WORD_BYTES and len(rows[3].unique()) == 16


def test_the_memory_of_words_is_bounded_and_harmless(monkeypatch):
    monkeypatch.setattr(words_module, "MEMORY", 50)
    encoder = build_text_encoder(HashConfig(dim=16))
    first = encoder(CAPTIONS).embeddings
    for start in range(0, 400, 20):
        encoder([f"word{i}" for i in range(start, start + 20)])
        assert all(
            len(known) <= 80
            for known in (encoder.words.numbers, encoder.words.rows, encoder.words.captions)
        )
    assert torch.equal(encoder(CAPTIONS).embeddings, first)


def test_a_batch_is_prepared_alike_whatever_was_read_before():
    """Else a resumed run would add its gradients up in another order."""
    fresh, used = (build_text_encoder(ByteLevelConfig(dim=16, num_heads=2)).words for _ in range(2))
    cpu, captions = torch.device("cpu"), ["a red star", "", "blue red star on a blue ball"]
    used(["ball blue", "zebra", "a red star"], cpu)
    prepared = [words(captions, cpu) for words in (fresh, used, used)]
    for parts in prepared[1:]:
        assert all(torch.equal(a, b) for a, b in zip(prepared[0], parts, strict=True))
    rows, index, valid = prepared[0]
    assert torch.equal(
        rows, byte_rows(["a", "red", "star", "blue", "on", "ball"])
    )  # in the order of the text
    assert index[valid].tolist() == [0, 1, 2, 3, 1, 2, 4, 0, 3, 5] and valid.sum(1).tolist() == [
        3,
        0,
        7,
    ]


def test_preparing_a_large_batch_is_fast():
    encoder = build_text_encoder(ByteLevelConfig(dim=32))
    draw = random.Random(0)
    words = [
        "a",
        "large",
        "red",
        "star",
        "drifts",
        "to",
        "the",
        "left",
        "on",
        "gray",
        "background,",
        "navy",
        "ring",
    ]
    captions = [" ".join(draw.choices(words, k=12)) for _ in range(512)]
    encoder.words(captions, torch.device("cpu"))
    times = []
    for _ in range(20):
        start = time.process_time()  # other processes on the machine do not count
        encoder.words(captions, torch.device("cpu"))
        times.append(time.process_time() - start)
    assert min(times) < 2e-3


# ── hash ──────────────────────────────────────────────────────────────────────────────────────────
GOLDEN = [  # "red" and "star" at the first two places
    [1.5289, 0.8460, 1.7229, 0.6355, 1.0648, -0.4782, 0.2202, 1.3100],
    [0.5167, 0.5695, 0.3633, 0.2426, 1.2679, 1.1445, 1.5788, -1.1156],
]


def test_hash_vectors_never_change():
    """Trained models depend on these numbers: if they change, shipped checkpoints no longer
    understand their prompts."""
    encoder = build_text_encoder(HashConfig(dim=8))
    torch.manual_seed(123)
    ours = encoder(["Red, star"]).embeddings[0]
    torch.testing.assert_close(ours, torch.tensor(GOLDEN), rtol=1e-4, atol=1e-4)


def test_hash_is_the_same_in_every_process_and_rank():
    script = (
        "import sys, torch; sys.path.insert(0, '.'); torch.manual_seed(7)\nfrom mmdit.text_encoders"
        " import HashConfig, build_text_encoder\nencoder = build_text_encoder(HashConfig(dim=16));"
        " encoder(['blue and other words first'])\nprint(encoder(['red star',"
        " 'blue']).embeddings.double().flatten().tolist())"
    )
    theirs = warm.run("-c", script).stdout
    ours = build_text_encoder(HashConfig(dim=16))(["red star", "blue"]).embeddings
    assert ours.double().flatten().tolist() == json.loads(theirs)


def test_hash_words_are_independent_and_of_unit_variance():
    encoder = build_text_encoder(HashConfig(dim=256))
    vectors = encoder([f"word{i}" for i in range(500)]).embeddings[:, 0] - encoder.positions[0]
    assert abs(vectors.mean()) < 0.01 and abs(vectors.std() - 1) < 0.01
    cosines = F.normalize(vectors, dim=1) @ F.normalize(vectors, dim=1).T
    assert (cosines - torch.eye(500)).abs().max() < 0.4  # 6 standard deviations of 1/√256
    same = encoder(["Red, red RED (red)"]).embeddings[0] - encoder.positions[:4]
    torch.testing.assert_close(same, same[:1].expand(4, -1), rtol=0, atol=1e-5)
    assert (
        not list(encoder.parameters())
        and not encoder.state_dict()
        and not encoder(["red"]).embeddings.requires_grad
    )


# ── byte level ────────────────────────────────────────────────────────────────────────────────────
def test_a_convolution_tells_a_word_of_those_beside_it_and_of_no_other():
    torch.manual_seed(0)
    encoder = build_text_encoder(ByteLevelConfig(dim=16, depth=0, convolution=3))
    tokens = encoder(["a red star on gray", "a blue star on gray", "star"]).embeddings
    same = (tokens[0] == tokens[1]).all(dim=-1)
    assert same.tolist() == [False, False, False, True, True]
    words = torch.arange(6.0).view(1, 3, 2)
    beside = [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5], [2, 3, 4, 5, 0, 0]]
    assert side_by_side(words, 3).tolist() == [beside]
    assert side_by_side(words, 1).equal(words)
    with pytest.raises(ConfigError, match="odd"):
        ByteLevelConfig(convolution=4)


def test_byte_level_output_has_unit_scale():
    torch.manual_seed(0)
    text = build_text_encoder(ByteLevelConfig())(
        ["a large red star drifts to the left on a gray background"]
    )
    assert 0.9 < text.embeddings.square().mean().sqrt() < 1.1


@pytest.mark.parametrize("convolution", [1, 3])
def test_byte_level_trains_every_parameter_even_on_empty_captions(convolution):
    torch.manual_seed(0)
    encoder = build_text_encoder(ByteLevelConfig(dim=16, num_heads=2, convolution=convolution))
    encoder(["a red star", "", "blue"]).embeddings.square().mul(torch.randn(16)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name
    encoder.zero_grad(set_to_none=True)
    encoder(
        ["", ""]
    ).embeddings.sum().backward()  # a rank may draw nothing else: DDP needs every gradient
    assert all(
        parameter.grad is not None and (parameter.grad == 0).all()
        for parameter in encoder.parameters()
    )


def test_byte_level_never_attends_to_nothing(monkeypatch):
    """A softmax over no key is zero on this device and NaN on another, then the gradient of
    everything is NaN."""
    masks = []
    monkeypatch.setattr(
        byte_level_module,
        "attend",
        lambda q, k, v, valid: masks.append(valid) or attend(q, k, v, valid),
    )
    build_text_encoder(ByteLevelConfig(dim=16, num_heads=2))(CAPTIONS)
    assert len(masks) == 2 and all(mask.any(dim=-1).all() and not mask.all() for mask in masks)


def test_byte_level_reads_context():
    """The token of `ball` must know which colour stands before it: that is what binds
    attributes."""
    torch.manual_seed(0)
    encoder = build_text_encoder(ByteLevelConfig(dim=32, num_heads=2))
    a, b = encoder(["red ball on blue", "blue ball on red"]).embeddings[:, 1]
    assert (a - b).abs().max() > 0.05
    torch.manual_seed(0)
    bag = build_text_encoder(ByteLevelConfig(dim=32, num_heads=2, depth=0))
    a, b = bag(["red ball on blue", "blue ball on red"]).embeddings[:, 1]
    assert torch.equal(a, b)


def test_byte_level_frozen_has_no_gradient_and_the_same_values():
    torch.manual_seed(0)
    trained = build_text_encoder(ByteLevelConfig(dim=16, num_heads=2))
    frozen = build_text_encoder(ByteLevelConfig(dim=16, num_heads=2, freeze=True))
    frozen.load_state_dict(trained.state_dict())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    a, b = trained(CAPTIONS).embeddings, frozen(CAPTIONS).embeddings
    assert a.requires_grad and not b.requires_grad and torch.equal(a, b)


def test_byte_level_under_autocast():
    torch.manual_seed(0)
    encoder = build_text_encoder(ByteLevelConfig(dim=32, num_heads=2))
    with torch.autocast("cpu", torch.bfloat16):
        half = encoder(CAPTIONS)
    assert half.embeddings.dtype == torch.float32
    torch.testing.assert_close(half.embeddings, encoder(CAPTIONS).embeddings, rtol=0.1, atol=0.1)


class Reader(nn.Module):
    """Stands in for a diffusion model: learned queries attend to the text and say three facts."""

    def __init__(self, dim):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(3, 64))
        self.keys, self.values, self.answer = (
            nn.Linear(dim, 64),
            nn.Linear(dim, 64),
            nn.Linear(64, 8),
        )

    def forward(self, text):
        keys, values = self.keys(text.embeddings), self.values(text.embeddings)
        queries = self.queries.expand(len(keys), -1, -1)
        return self.answer(
            F.scaled_dot_product_attention(queries, keys, values, attn_mask=text.valid[:, None])
        )


@pytest.mark.thorough
def test_byte_level_learns_which_colour_belongs_to_what():
    """Object and background share their colour words; only order and templates tell whose is
    whose."""
    colors = ["red", "blue", "green", "yellow", "purple", "orange", "white", "black"]
    shapes = ["circle", "square", "star", "ring", "heart", "cross"]
    templates = [
        "a {} {} on a {} background",
        "{2} background, {0} {1}",
        "the {1} is {0}; behind it all is {2}",
    ]

    def draw(generator, count):
        facts = [[generator.randrange(n) for n in (8, 6, 8)] for _ in range(count)]
        captions = [
            generator.choice(templates).format(colors[c], shapes[s], colors[b]) for c, s, b in facts
        ]
        return captions, torch.tensor(facts)

    torch.manual_seed(0)
    encoder = build_text_encoder(ByteLevelConfig(dim=64, num_heads=2))
    reader = Reader(64)
    optimizer = torch.optim.AdamW([*encoder.parameters(), *reader.parameters()], lr=1e-3)
    generator = random.Random(0)
    for _ in range(100):
        captions, facts = draw(generator, 64)
        loss = F.cross_entropy(reader(encoder(captions)).flatten(0, 1), facts.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    captions, facts = draw(random.Random(1), 256)
    accuracy = (reader(encoder(captions)).argmax(-1) == facts).float().mean(0)
    assert accuracy.min() > 0.95, accuracy


# ── transformers ──────────────────────────────────────────────────────────────────────────────────
def reference(name, model, ids):
    """The library's own answer for one caption without padding, from the whole model."""
    ids = torch.tensor([ids])
    part = {"clip": "text_model", "siglip": "text_model"}.get(name)
    part = (
        getattr(model, part)
        if part
        else model
        if name in ("clip_text", "bert", "roberta")
        else model.get_encoder()
    )
    with torch.no_grad():
        return part(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("freeze", [*thorough(True), False])
def test_hf_gives_what_the_library_gives_without_padding(checkpoint, name, freeze):
    folder, model = checkpoint(name)
    encoder = hf(folder, freeze=freeze)
    text = encoder(CAPTIONS)
    for i, caption in enumerate(CAPTIONS):
        if caption.strip():
            ids = [VOCABULARY.index(word) for word in caption.split()] + [1]
            expected = reference(name, model, ids)
            assert text.valid[i].sum() == len(ids)
            torch.testing.assert_close(
                text.embeddings[i, : len(ids)].detach(), expected, rtol=1e-5, atol=2e-6
            )
    assert encoder.dim == 16
    assert not any("decoder" in key or "vision" in key for key in encoder.state_dict())
    assert text.embeddings.requires_grad != freeze


@pytest.mark.parametrize("name", ["t5", "umt5", "t5gemma", "clip_text", "siglip", "bert"])
def test_hf_trained_reaches_the_optimizer_and_ddp_finds_every_gradient(checkpoint, name):
    encoder = hf(checkpoint(name)[0], freeze=False)
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    unused = [key for key, parameter in encoder.named_parameters() if not parameter.requires_grad]
    assert trained and all("pooler" in key or "head" in key for key in unused)
    assert bool(unused) == (name in ("siglip", "bert"))
    before = encoder(CAPTIONS).embeddings
    optimizer = torch.optim.SGD(trained, lr=0.1)
    before.square().mul(torch.linspace(0, 1, 16)).sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained
    )
    optimizer.step()
    assert not torch.allclose(encoder(CAPTIONS).embeddings, before, atol=1e-3)
    optimizer.zero_grad(set_to_none=True)
    encoder(["", " "]).embeddings.sum().backward()
    assert all(parameter.grad is not None and (parameter.grad == 0).all() for parameter in trained)


def test_hf_frozen_stays_as_it_is(checkpoint):
    encoder = hf(checkpoint("t5")[0])
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    encoder.train()
    assert encoder.training and not encoder.encoder.training


def count_calls(encoder, monkeypatch):
    calls = []
    inner = encoder.encoder.forward
    monkeypatch.setattr(
        encoder.encoder, "forward", lambda **k: calls.append(k["input_ids"].shape) or inner(**k)
    )
    return calls


def test_hf_frozen_encodes_a_caption_once_with_the_same_bits_as_without_memory(
    checkpoint, monkeypatch
):
    folder, _ = checkpoint("t5")
    kept, none = hf(folder), hf(folder, cache_mb=0)
    calls = count_calls(kept, monkeypatch)
    first = kept(CAPTIONS).embeddings
    assert calls == [(8, 16)]
    assert torch.equal(kept(CAPTIONS).embeddings, first) and len(calls) == 1
    assert torch.equal(none(CAPTIONS).embeddings, first)
    draw = random.Random(0)
    captions = [" ".join(draw.choices(VOCABULARY[3:], k=draw.randint(1, 14))) for _ in range(40)]
    whole = none(captions)
    for i in draw.sample(
        range(40), 12
    ):  # another company, another order: a resumed run starts with an empty memory
        one = kept([captions[i]])
        assert torch.equal(one.embeddings[0], whole.embeddings[i, : one.embeddings.shape[1]])
    assert "" not in kept._recent.rows and not none._recent.rows


def test_hf_memory_is_bounded_and_drops_the_oldest(checkpoint, monkeypatch):
    encoder = hf(checkpoint("t5")[0], cache_mb=1)
    assert encoder._recent.limit == 1 << 20
    row = 2 * 16 * 4  # "red </s>" in bytes
    encoder._recent.limit = 5 * row + row // 2
    calls = count_calls(encoder, monkeypatch)
    for word in VOCABULARY[3:8]:
        encoder([word])
    encoder([VOCABULARY[3]])  # used again: now the newest
    assert len(calls) == 5 and encoder._recent.bytes == 5 * row
    encoder(["gray"])
    assert (
        list(encoder._recent.rows) == [*VOCABULARY[5:8], VOCABULARY[3], "gray"]
        and encoder._recent.bytes == 5 * row
    )


def test_hf_forgets_when_its_weights_change(checkpoint):
    encoder, other = hf(checkpoint("t5")[0]), hf(checkpoint("t5")[0])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    encoder(CAPTIONS)
    encoder.load_state_dict(other.state_dict())
    assert torch.equal(encoder(CAPTIONS).embeddings, other(CAPTIONS).embeddings)


def test_hf_precision(checkpoint):
    folder, _ = checkpoint("t5")
    exact, half = hf(folder), hf(folder, dtype="bfloat16")
    assert (
        next(half.parameters()).dtype == torch.bfloat16
        and half(CAPTIONS).embeddings.dtype == torch.float32
    )
    expected = exact(CAPTIONS).embeddings
    assert 0 < (half(CAPTIONS).embeddings - expected).norm() / expected.norm() < 0.05
    exact.forget()
    with torch.autocast("cpu", torch.bfloat16):  # training and sampling must read the same text
        assert torch.equal(exact(CAPTIONS).embeddings, expected)


def test_hf_refuses_embeddings_that_are_no_numbers(checkpoint):
    encoder = hf(checkpoint("t5")[0])
    with torch.no_grad():
        encoder.encoder.get_input_embeddings().weight[VOCABULARY.index("star")] = float("nan")
    encoder(["a red ball"])
    with pytest.raises(ValueError, match="NaN embeddings for 'a red star'"):
        encoder(["a red star"])


# ── mistakes of people ────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "keys, path, words",
    [
        ({"type": "hash", "freeze": False}, "text_encoder.freeze", ["byte_level"]),
        ({"type": "hash", "dim": 7}, "text_encoder.dim", ["7", "even"]),
        ({"type": "hash", "max_length": 0}, "text_encoder.max_length", ["0"]),
        ({"type": "hash", "depth": 2}, "text_encoder.depth", ["unknown key"]),
        ({"dim": 30, "num_heads": 4}, "text_encoder.dim", ["30", "4"]),
        ({"type": "byte_level", "depth": -1}, "text_encoder.depth", ["-1"]),
        ({"type": "hf"}, "text_encoder.name_or_path", ["empty"]),
        ({"type": "hf", "name_or_path": "x", "cache_mb": -1}, "text_encoder.cache_mb", ["-1"]),
        (
            {"type": "hf", "name_or_path": "x", "freeze": False, "dtype": "bfloat16"},
            "text_encoder.dtype",
            ["float32"],
        ),
        (
            {"type": "hf", "name_or_path": "x", "trust_remote_code": True},
            "text_encoder.trust_remote_code",
            ["unknown key"],
        ),
        ({"type": "t5"}, "text_encoder.type", ["'t5'", "hf"]),
    ],
)
def test_bad_settings_name_the_key(keys, path, words):
    with pytest.raises(ConfigError) as error:
        config_module.decode(TextEncoderConfig, keys, "text_encoder")
    assert error.value.path == path and all(word in str(error.value) for word in words), error.value


def test_settings_survive_a_round_trip():
    for config in (
        ByteLevelConfig(depth=1),
        HashConfig(dim=64),
        HuggingFaceConfig(name_or_path="a/b", dim=8, freeze=False),
    ):
        assert config_module.decode(TextEncoderConfig, config_module.encode(config)) == config
    assert config_module.decode(TextEncoderConfig, {}) == ByteLevelConfig()


@pytest.mark.parametrize(
    "keys, path, words",
    [
        ({"dim": 512}, "text_encoder.dim", ["512", "16"]),
        ({"max_length": 77}, "text_encoder.max_length", ["77", "20"]),
    ],
)
def test_hf_settings_that_contradict_the_checkpoint(checkpoint, keys, path, words):
    with pytest.raises(ConfigError) as error:
        hf(checkpoint("clip_text")[0], **keys)
    assert error.value.path == path and all(word in str(error.value) for word in words), error.value
    assert hf(checkpoint("clip_text")[0], dim=16).dim == 16


def test_no_caption_is_longer_than_the_places_that_an_encoder_has(checkpoint):
    """RoBERTa begins to count behind the number of its padding: one place of 20 is none."""
    folder, _ = checkpoint("roberta")
    with pytest.raises(ConfigError, match="max_length: is 20, but .* reads at most 19; set 19"):
        hf(folder, max_length=20)
    assert hf(folder, max_length=19)(["red " * 40]).valid.sum() == 19


def test_hf_sources_that_cannot_be_loaded_say_what_where_and_what_to_do(checkpoint, tmp_path):
    def message(source, **keys):
        with pytest.raises(ConfigError) as error:
            hf(str(source), **keys)
        assert error.value.path == "text_encoder.name_or_path" and str(source) in str(error.value)
        assert len(str(error.value)) < 700 and "\n" not in str(error.value)
        return str(error.value)

    assert "no folder" in message(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "cannot load its" in message(tmp_path / "empty")
    assert "local_files_only is true" in message("nobody/no-such-encoder", local_files_only=True)

    bare = tmp_path / "bare"
    transformers.T5EncoderModel(transformers.T5Config(**{**T5, "vocab_size": 128})).save_pretrained(
        bare
    )
    assert "tokenizer" in message(bare)  # transformers 5 would make an empty one
    save_tokenizer(bare, (*VOCABULARY, *(f"word{i}" for i in range(140))))
    assert "152 entries" in message(bare) and "128" in message(bare)
    save_tokenizer(bare)
    weights = bare / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    assert "cannot load its weights" in message(bare)
    weights.unlink()
    assert "cannot load its weights" in message(bare)

    from safetensors.torch import load, save_file

    partial = {key: value for key, value in load(content).items() if "block.1.layer.0" not in key}
    save_file(partial, weights, {"format": "pt"})
    assert "are absent" in message(bare) and "encoder.block.1.layer.0" in message(bare)


def test_hf_never_runs_code_from_a_checkpoint(checkpoint, tmp_path):
    import shutil

    folder = tmp_path / "remote"
    shutil.copytree(checkpoint("t5")[0], folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "model_type": "unheard_of",
        "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "code.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n"
    )
    with pytest.raises(ConfigError, match="cannot load its config"):
        hf(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(transformers is None, reason="transformers is not installed")
def test_hf_encoder_decoders_without_a_known_encoder_half(tmp_path):
    config = transformers.BartConfig(
        vocab_size=32,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=20,
    )
    transformers.BartModel(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="no encoder half is known for model_type 'bart'"):
        hf(str(tmp_path))


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="pip install transformers") as error:
        hf("google/flan-t5-base")
    assert error.value.path == "text_encoder.type"
    assert build_text_encoder(ByteLevelConfig(dim=16, num_heads=2))(CAPTIONS).valid.any()
