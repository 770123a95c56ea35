import copy

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

from dfq.prepare import (
    QConv2d,
    QReLU,
    calibrate,
    describe,
    parse_bits,
    prepare,
    split_parameters,
)
from dfq.types import DataSpec, InputError, QuantSpec


def _bits(student):
    return {row.name: (row.weight_bits, row.input_bits) for row in describe(student)}


@pytest.mark.parametrize("weights", range(2, 9))
@pytest.mark.parametrize("activations", range(2, 9))
def test_parse_bits(weights, activations):
    assert parse_bits(f"w{weights}a{activations}") == (weights, activations)


@given(st.text(alphabet="wa0123456789W \n") | st.none() | st.integers())
def test_other_bits_are_refused(text):
    assume(text not in {f"w{w}a{a}" for w in range(2, 9) for a in range(2, 9)})
    with pytest.raises(InputError, match="w4a4"):
        parse_bits(text)


def test_teacher_is_left_as_it_was(net, images):
    before = copy.deepcopy(net.state_dict())
    student = prepare(net, "w4a4")
    calibrate(student, images)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert type(net.stem) is nn.Conv2d
    assert type(net.norm) is nn.BatchNorm2d
    assert not any(p.requires_grad for p in net.parameters())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_student_trains_in_every_parameter(net, images):
    student = prepare(net, "w4a4")
    calibrate(student, images)
    student.train()
    student(images)["logits"].square().sum().backward()
    assert all(p.requires_grad for p in student.parameters())
    assert all(p.grad.abs().sum() > 0 for p in student.parameters())
    assert torch.equal(student.norm.running_mean, net.norm.running_mean)
    assert student.norm.num_batches_tracked == 0


def test_brecq_quantizes_all_and_keeps_the_edges_at_8_bits(net):
    assert _bits(prepare(net, "w4a3")) == {
        "stem": (8, 8),
        "grouped": (4, 8),  # takes in what the first layer puts out
        "pointwise": (4, 3),
        "head": (8, 8),
    }
    six = _bits(prepare(net, "w4a3", edge_bits=6))
    assert (six["stem"], six["grouped"]) == ((6, 6), (4, 6))
    assert _bits(prepare(net, "w4a5", edge_bits=2))["grouped"] == (4, 5)
    student = prepare(net, "w2a4")
    assert student.grouped.weight_quantizer.spec == QuantSpec(2, axis=0, midrise=True)
    assert student.stem.weight_quantizer.spec == QuantSpec(8, axis=0)
    assert student.pointwise.input_quantizer.spec == QuantSpec(4, symmetric=False, signed=False)


@pytest.mark.parametrize(("scales", "mode"), [("learned", "learned"), ("minmax", "dynamic")])
def test_per_channel_means_output_channels(net, images, scales, mode):
    student = prepare(net, "w4a4", scales=scales)
    calibrate(student, images)
    for layer in (student.stem, student.grouped, student.pointwise, student.head):
        assert layer.weight_quantizer.mode == mode
        scale, zero_point = layer.weight_quantizer.qparams(layer.weight)
        assert len(scale) == len(zero_point) == layer.weight.shape[0]
        assert len(layer.input_quantizer.scale) == 1


def test_gdfq_quantizes_all_weights_and_the_relus(net):
    student = prepare(net, "w4a3", protocol="gdfq")
    assert _bits(student) == {
        "stem": (4, None),
        "relu": (None, 3),
        "grouped": (4, None),
        "pointwise": (4, None),
        "head": (4, None),
    }
    assert isinstance(student.relu, QReLU)
    assert _bits(prepare(net, "w4a3", protocol="gdfq", edge_bits=8))["head"] == (8, None)


def test_gdfq_with_minmax_is_the_quantizer_of_the_paper(net, images):
    student = prepare(net, "w4a4", protocol="gdfq", scales="minmax")
    calibrate(student, images, batch_size=4)
    weight = student.stem.weight.detach()
    low, high = weight.flatten(1).amin(1), weight.flatten(1).amax(1)
    scale = (high - low) / 15  # the released code: codes a unit n / (max - min)
    offset = torch.round(low / scale)
    codes = torch.round(weight / scale[:, None, None, None]) - offset[:, None, None, None]
    expected = (codes.clamp(0, 15) + offset[:, None, None, None]) * scale[:, None, None, None]
    torch.testing.assert_close(student.stem.weight_quantizer(weight), expected)
    assert student.relu.quantizer.mode == "ema"
    assert split_parameters(student)[1] == []


def test_functional_relus_are_refused_by_gdfq():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LeakyReLU())
    with pytest.raises(InputError, match=r"nn\.ReLU.*brecq"):
        prepare(model, "w4a4", protocol="gdfq")


def test_overrides_beat_the_rules_and_the_last_one_wins(net):
    overrides = {"*": "w5a6", "grouped": 8, "h*": None}
    assert _bits(prepare(net, "w4a4", overrides=overrides)) == {
        "stem": (5, 6),
        "grouped": (8, 8),
        "pointwise": (5, 6),
        "head": (None, None),
    }
    student = prepare(net, "w4a4", protocol="gdfq", overrides={"relu": "w4a8", "stem": None})
    assert student.relu.quantizer.spec.bits == 8
    assert type(student.stem) is nn.Conv2d


def test_an_override_holds_for_all_below(net):
    model = nn.Sequential(net.stem, nn.Sequential(net.grouped, net.pointwise), net.grouped)
    assert _bits(prepare(model, "w4a4", overrides={"1": None}))["1.1"] == (None, None)


def test_edges_are_those_that_stay_quantized(net):
    assert _bits(prepare(net, "w4a4", overrides={"stem": None})) == {
        "stem": (None, None),
        "grouped": (8, 8),
        "pointwise": (4, 8),
        "head": (8, 8),
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bits": "w9a9"}, "w9a9"),
        ({"protocol": "qat"}, "protocol must be"),
        ({"scales": "lsq"}, "scales must be"),
        ({"edge_bits": 9}, "edge_bits must be"),
        ({"edge_bits": 0}, "edge_bits must be"),
        ({"overrides": {"nothing": 8}}, "'nothing' matches no module"),
        ({"overrides": {"stem": "w1a1"}}, "w1a1"),
        ({"overrides": {"stem": 16}}, "w16a16"),
        ({"data": DataSpec(shape=(1, 8, 8), classes=2)}, r"\(1, 8, 8\)"),
        ({"overrides": {"*": None}}, "no nn.Conv2d"),
    ],
)
def test_bad_options_are_refused(net, options, words):
    with pytest.raises(InputError, match=words):
        prepare(net, **{"bits": "w4a4"} | options)


class Unordered(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(4, 2)
        self.head = nn.Linear(4, 2)
        self.stem = nn.Conv2d(3, 4, 1)
        self.body = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


def test_data_finds_the_edges_by_running():
    defined = _bits(prepare(Unordered(), "w4a4"))
    run = _bits(prepare(Unordered(), "w4a4", data=DataSpec(shape=(3, 6, 6), classes=2)))
    assert defined == {"unused": (8, 8), "head": (4, 8), "stem": (4, 4), "body": (8, 8)}
    assert run == {"unused": (4, 4), "head": (8, 8), "stem": (8, 8), "body": (4, 8)}


def test_data_gives_the_input_the_range_of_every_possible_image(images):
    data = DataSpec(shape=(3, 6, 6), classes=2, mean=(0.5, 0.25, 0.5), std=(0.5, 0.25, 0.5))
    student = prepare(Unordered(), "w4a4", data=data)
    quantizer = student.stem.input_quantizer
    calibrate(student, images / 100)  # generated images that hold little of the range
    levels = quantizer.levels[0]
    step = (3.0 - -1.0) / 255
    torch.testing.assert_close(levels[[0, -1]], torch.tensor([-1.0, 3.0]), atol=step, rtol=0)
    assert not list(quantizer.parameters())  # and no training moves it


def test_the_input_range_is_left_to_calibration_where_the_layer_comes_again():
    conv = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(conv, conv, nn.Flatten(), nn.Linear(108, 2))
    student = prepare(model, "w4a4", data=DataSpec(shape=(3, 6, 6), classes=2))
    assert student[0].input_quantizer.mode == "learned"


def test_a_module_in_two_places_stays_one_module(images):
    conv = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(conv, nn.Conv2d(3, 3, 3), conv, nn.Flatten(), nn.Linear(108, 2))
    student = prepare(model, "w4a4")
    assert isinstance(student[0], QConv2d)
    assert student[0] is student[2]
    calibrate(student, images)
    assert set(model.state_dict()) <= set(student.state_dict())


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    student = prepare(model, "w4a4")
    assert student[0].weight is student[1].weight
    assert student[0].weight is not model[0].weight


def test_a_single_layer_is_a_model():
    student = prepare(nn.Conv2d(3, 4, 1), "w4a4")
    assert isinstance(student, QConv2d)
    assert student.weight_quantizer.spec.bits == 8  # first and last at once


def test_output_structure_and_input_channels_are_free(make_net):
    for channels in (1, 3, 7):
        model, x = make_net(channels), torch.randn(4, channels, 8, 8)
        student = prepare(model, "w8a8")
        calibrate(student, x)
        outputs, expected = student(x), model(x)
        assert set(outputs) == {"logits", "features"}
        gap = (outputs["logits"] - expected["logits"]).abs().max()
        assert 0 < gap < 0.02 * expected["logits"].abs().max()


def test_state_dict_moves_to_another_student(net, images):
    first, second = prepare(net, "w4a4"), prepare(net, "w4a4")
    calibrate(first, images)
    assert set(net.state_dict()) < set(first.state_dict())
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(images)["logits"], first(images)["logits"])


def test_copies_of_a_student_are_students(net, images):
    student = prepare(net, "w4a4")
    calibrate(student, images)
    other = copy.deepcopy(student).train()
    assert not other.norm.training
    assert torch.equal(other(images)["logits"], student(images)["logits"])


@pytest.mark.parametrize("scales", ["learned", "minmax"])
def test_a_student_compiles_as_one_graph(net, images, scales):
    student = prepare(net, "w2a4", scales=scales)
    calibrate(student, images)
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    gradients = []
    for run in (student, compiled):
        student.zero_grad()
        logits = run(images)["logits"]
        logits.square().sum().backward()
        gradients.append([logits, *(p.grad for p in student.parameters())])
    torch.testing.assert_close(*gradients)


def test_split_parameters_covers_each_once(net):
    student = prepare(net, "w4a4")
    weights, scales = split_parameters(student)
    assert len(scales) == 8  # weight and input of four layers
    assert {id(p) for p in weights + scales} == {id(p) for p in student.parameters()}
    assert len(weights) + len(scales) == len(list(student.parameters()))


def test_description_names_what_stays_float():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 3), nn.LayerNorm(3))
    rows = describe(prepare(model, "w4a4"))
    assert [tuple(row) for row in rows] == [
        ("0", "Embedding", None, None),
        ("1", "QLinear", 8, 8),
    ]


class Standardized(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def _hooked():
    layer = nn.Linear(3, 3)
    layer.register_forward_hook(lambda *_: None)
    return layer


def _nan():
    layer = nn.Linear(3, 3)
    nn.init.constant_(layer.weight, torch.nan)
    return layer


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.ConvTranspose2d(3, 3, 1), "ConvTranspose2d"),
        (lambda: nn.Conv1d(3, 3, 1), "Conv1d"),
        (lambda: nn.MultiheadAttention(4, 2), "MultiheadAttention"),
        (lambda: nn.LSTM(3, 3), "LSTM"),
        (lambda: Standardized(3, 3, 1), "Standardized"),
        (lambda: parametrizations.weight_norm(nn.Linear(3, 3)), "remove_parametrizations"),
        (lambda: weight_norm(nn.Linear(3, 3)), "hooks"),
        (_hooked, "hooks"),
        (_nan, "NaN"),
        (lambda: nn.Linear(3, 3).double(), "float64"),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_cannot_be_quantized_is_refused_by_name(make, words):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(make()), nn.Linear(3, 2))
    with pytest.raises(InputError, match=rf"1\.0 .*{words}.*overrides=\{{'1\.0': None\}}"):
        prepare(model, "w4a4")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_lazy_model_is_refused():
    with pytest.raises(InputError, match="1 has no weights yet; run one batch"):
        prepare(nn.Sequential(nn.Conv2d(3, 3, 1), nn.LazyConv2d(3, 1)), "w4a4")


def test_what_cannot_be_quantized_may_stay_float():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ConvTranspose2d(3, 3, 1), nn.Conv2d(3, 3, 1))
    student = prepare(model, "w4a4", overrides={"1": None})
    assert type(student[1]) is nn.ConvTranspose2d
    assert ("1", "ConvTranspose2d", None, None) in describe(student)


def test_a_student_is_not_prepared_twice(net):
    with pytest.raises(InputError, match="stem is quantized already"):
        prepare(prepare(net, "w8a8"), "w4a4")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_script_module_is_refused():
    with pytest.raises(InputError, match="ScriptModule"):
        prepare(torch.jit.trace(nn.Linear(3, 3), torch.ones(1, 3)), "w4a4")
