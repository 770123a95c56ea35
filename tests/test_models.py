"""MODEL strings and weight files: what loads, and the sentence for everything that does not."""

import os
import types

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dfq.models import build, check, freeze, load
from dfq.models.cifar import CifarResNet
from dfq.types import DataSpec, InputError
from tests.tiny import DATA, MODEL, network, without_batch_norm

CIFAR = DataSpec((3, 32, 32), 10)


@pytest.fixture(scope="module")
def resnet20():
    return CifarResNet(20)


def _refused(path, name="cifar:resnet20", data=CIFAR):
    with pytest.raises(InputError) as caught:
        load(name, data, path)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(("depth", "parameters"), [(20, 0.27e6), (56, 0.85e6), (110, 1.7e6)])
def test_cifar_resnets_have_the_size_of_the_paper(depth, parameters):
    count = sum(p.numel() for p in build(f"cifar:resnet{depth}", 10).parameters())
    assert count == pytest.approx(parameters, rel=0.02)  # table 6 of arXiv:1512.03385


def test_cifar_resnet_has_the_keys_of_published_weights(resnet20):
    keys = set(resnet20.state_dict())
    assert {"conv1.weight", "bn1.running_mean", "linear.bias"} <= keys
    assert {
        f"layer{i}.{j}.conv{k}.weight" for i in (1, 2, 3) for j in range(3) for k in (1, 2)
    } < keys
    assert not any("shortcut" in key for key in keys)


def test_cifar_resnet_uses_every_relu_once_and_can_be_traced(resnet20):
    graph = torch.fx.symbolic_trace(resnet20).graph
    relus = [n.target for n in graph.nodes if n.op == "call_module" and "relu" in n.target]
    assert len(relus) == len(set(relus)) == 19


def test_option_a_shortcut_subsamples_and_pads_with_zeros(resnet20):
    x = torch.randn(2, 16, 8, 8)
    y = resnet20.layer2[0].shortcut(x)
    assert y.shape == (2, 32, 4, 4)
    torch.testing.assert_close(y[:, 8:24], x[:, :, ::2, ::2], rtol=0, atol=0)
    assert y[:, :8].abs().sum() + y[:, 24:].abs().sum() == 0


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
        lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
    ],
    ids=["plain", "state_dict", "model", "module.", "without counters"],
)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".tar"])
def test_torch_files_load(tmp_path, resnet20, wrap, suffix):
    path = tmp_path / f"weights{suffix}"
    torch.save(wrap(resnet20.state_dict()), path)
    loaded = load("cifar:resnet20", CIFAR, path)
    torch.testing.assert_close(loaded.state_dict(), resnet20.state_dict(), rtol=0, atol=0)


def test_safetensors_load_and_half_precision_becomes_float(tmp_path, resnet20):
    path = tmp_path / "weights.safetensors"
    state = {k: v.half() if v.is_floating_point() else v for k, v in resnet20.state_dict().items()}
    save_file(state, path)
    loaded = load("cifar:resnet20", CIFAR, path)
    assert loaded.conv1.weight.dtype is torch.float32
    torch.testing.assert_close(loaded.conv1.weight, resnet20.conv1.weight.half().float())


def test_a_teacher_is_a_frozen_copy_in_eval_mode():
    model = network().double().train()
    teacher = freeze(model, DATA)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(m.training for m in teacher.modules())
    assert model.training
    assert model[0].weight.dtype is torch.float64
    assert model[0].weight.requires_grad


def test_a_missing_file_is_named(tmp_path):
    assert "there is no weight file" in _refused(tmp_path / "none.pt")


def test_an_unknown_suffix_is_refused(tmp_path):
    (tmp_path / "weights.bin").write_bytes(b"x")
    assert ".safetensors" in _refused(tmp_path / "weights.bin")


@pytest.mark.parametrize("content", [b"", b"no weights here, just text " * 20, None])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_corrupt_file_is_refused(tmp_path, resnet20, content, suffix):
    path = tmp_path / f"weights{suffix}"
    if content is None:  # cut off in the middle
        writer = torch.save if suffix == ".pt" else save_file
        writer(resnet20.state_dict(), path)
        content = path.read_bytes()[:50_000]
    path.write_bytes(content)
    assert "corrupt" in _refused(path)


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_pickled_code_is_not_run(tmp_path, monkeypatch, resnet20):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": resnet20.state_dict(), "note": _Evil()}, "evil.pt")
    assert "pickled" in _refused("evil.pt")
    assert not (tmp_path / "hacked").exists()


def test_a_pickled_model_is_refused_with_the_remedy(tmp_path, resnet20):
    torch.save(resnet20, tmp_path / "model.pt")
    assert "torch.save(model.state_dict(), FILE)" in _refused(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}], ids=["list", "no tensor", "empty"])
def test_what_is_no_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "weights.pt")
    assert "state_dict" in _refused(tmp_path / "weights.pt")


def test_keys_that_do_not_match_are_counted_and_named(tmp_path, resnet20):
    state = resnet20.state_dict()
    state["head.weight"] = state.pop("linear.weight")
    state["head.bias"] = state.pop("linear.bias")
    torch.save(state, tmp_path / "weights.pt")
    sentence = _refused(tmp_path / "weights.pt")
    assert "2 keys missing (linear.weight, linear.bias)" in sentence
    assert "2 keys unexpected (head.weight, head.bias)" in sentence


def test_long_lists_of_keys_are_cut(tmp_path):
    torch.save(CifarResNet(32).state_dict(), tmp_path / "weights.pt")
    sentence = _refused(tmp_path / "weights.pt")
    assert "72 keys unexpected" in sentence
    assert sentence.count("layer") == 3


def test_shapes_that_do_not_match_are_named(tmp_path):
    torch.save(CifarResNet(20, 100).state_dict(), tmp_path / "weights.pt")
    sentence = _refused(tmp_path / "weights.pt")
    assert "linear.weight is [100, 64] in the file and [10, 64] in the model" in sentence


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_weight_that_is_no_number_is_named(tmp_path, resnet20, value):
    state = {k: v.clone() for k, v in resnet20.state_dict().items()}
    state["layer2.1.bn1.running_var"][3] = float(value)
    torch.save(state, tmp_path / "weights.pt")
    sentence = _refused(tmp_path / "weights.pt").lower()
    assert "layer2.1.bn1.running_var" in sentence
    assert value in sentence


def test_a_model_without_batch_norm_is_refused():
    with pytest.raises(InputError, match=r"no BatchNorm .*GroupNorm"):
        check(without_batch_norm(), DATA)


def test_a_batch_norm_without_running_statistics_is_none():
    model = nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten())
    with pytest.raises(InputError, match="running statistics"):
        check(model, DataSpec((1, 2, 2), 4))


def test_a_shape_that_the_model_does_not_take_is_refused():
    with pytest.raises(InputError, match=r"does not take images of shape 3,8,8 .*--shape"):
        freeze(network(), DataSpec((3, 8, 8), 4))


class _Returns(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.network, self.change = network(), change

    def forward(self, x):
        return self.change(self.network(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda y: y[:, :3], "3 outputs but classes is 4"),
        (lambda y: {"out": y}, "returns dict"),
        (lambda y: y[:, :, None, None], r"\[2, 4, 1, 1\]"),
    ],
    ids=["classes", "dict", "maps"],
)
def test_an_output_that_is_not_logits_is_refused(change, words):
    with pytest.raises(InputError, match=words):
        freeze(_Returns(change), DATA)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet20", "cifar:resnet20, torchvision:NAME"),
        ("cifar:", "not understood"),
        ("cifar:resnet21", "choose from resnet20"),
        ("cifar:resnet20", "give --weights"),
        ("no.such.module:make", "no module no.such.module"),
        ("nothing.py:make", "no file nothing.py"),
        ("os:nothing", "defines no function nothing"),
        ("os:getcwd", "returns str"),
        ("os:chdir", r"os:chdir\(\) fails"),
    ],
)
def test_a_model_string_that_leads_nowhere_is_refused(name, words):
    with pytest.raises(InputError, match=words):
        load(name, CIFAR)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_missing_library_is_named_with_the_command(monkeypatch, library):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(InputError, match=f"pip install {library}"):
        load(f"{library}:resnet18", CIFAR)


def test_torchvision_models_come_pretrained_unless_weights_are_given(monkeypatch):
    asked = {}

    def get_model(name, **options):
        asked.update(name=name, **options)
        return network()

    models = types.SimpleNamespace(list_models=lambda: ["resnet18"], get_model=get_model)
    library = types.SimpleNamespace(models=models)
    monkeypatch.setitem(__import__("sys").modules, "torchvision", library)
    build("torchvision:resnet18", 4, pretrained=True)
    assert asked == {"name": "resnet18", "weights": "DEFAULT"}
    asked.clear()
    build("torchvision:resnet18", 4)
    assert asked == {"name": "resnet18", "weights": None, "num_classes": 4}
    with pytest.raises(InputError, match="did you mean resnet18"):
        build("torchvision:resnet81", 4)


def test_a_function_of_a_file_may_import_its_neighbors(tmp_path):
    (tmp_path / "beside_it.py").write_text("from tests.tiny import network\n")
    (tmp_path / "nets.py").write_text("import beside_it\nmake = beside_it.network\n")
    loaded = load(f"{tmp_path}/nets.py:make", DATA)
    torch.testing.assert_close(loaded[0].weight, network()[0].weight)


def test_the_models_own_weights_are_kept_without_a_file():
    loaded = load(MODEL, DATA)
    torch.testing.assert_close(loaded.state_dict(), network().state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def make(: pass", "SyntaxError"),
        ("import no_such_package_at_all", "needs the package no_such_package_at_all"),
        ("raise OSError('the disk is full')", "OSError: the disk is full"),
    ],
)
def test_a_file_that_does_not_import_says_why(tmp_path, source, words):
    (tmp_path / "broken.py").write_text(source)
    with pytest.raises(InputError, match=words):
        load(f"{tmp_path}/broken.py:make", DATA)


def test_convolutions_of_a_teacher_run_in_channels_last():
    teacher = freeze(network(), DATA)
    x = torch.randn(2, *DATA.shape)
    conv = next(m for m in teacher.modules() if isinstance(m, nn.Conv2d))
    assert conv(x).is_contiguous(memory_format=torch.channels_last)


def test_a_model_that_looks_at_strides_keeps_its_layout():
    class Viewing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
            self.head = nn.Linear(4 * 6 * 6, 4)

        def forward(self, x):
            return self.head(self.norm(self.conv(x)).view(len(x), -1))

    model = Viewing().eval()
    x = torch.randn(3, *DATA.shape)
    assert torch.equal(freeze(model, DATA)(x), model(x))
