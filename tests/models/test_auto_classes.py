"""Auto classes: after `import hf_deit` they return ours, whoever was imported first."""

import os
import subprocess
import sys

import pytest
import transformers

from hf_deit import DeiTConfig, DeiTForImageClassification, DeiTForImageClassificationWithTeacher, DeiTModel
from hf_deit.models.auto_classes import register_configurations


CLASSES = (DeiTModel, DeiTForImageClassification, DeiTForImageClassificationWithTeacher)
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
SIZES |= {"image_size": 32, "patch_size": 8}

# What a process imports, and what holds at that moment.
ORDERS = {
    "ours_first": """
import pickle
import hf_deit
from transformers import MODEL_MAPPING, AutoModel
pickle.loads(pickle.dumps(MODEL_MAPPING))
assert 'transformers.modeling_utils' not in sys.modules, "our model was imported before anyone asked for it"
""",
    "theirs_first": """
from transformers import AutoModel
import hf_deit
assert 'transformers.modeling_utils' not in sys.modules, "our model was imported before anyone asked for it"
""",
    # Transformers' own layers import AutoModel before they are whole, and our model needs them.
    "amid_the_import_of_what_our_model_needs": """
import hf_deit
import transformers.modeling_layers
""",
}
USE = """
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline
for name, auto in zip(sys.argv[1:], (AutoModel, AutoModelForImageClassification, AutoModelForImageClassification)):
    print(type(AutoConfig.from_pretrained(name)).__module__, type(auto.from_pretrained(name)).__name__)
    print(type(AutoImageProcessor.from_pretrained(name)).__name__)
print(type(pipeline('image-classification', name).model).__module__)
from hf_deit import DeiTConfig, DeiTModel
assert AutoModel._model_mapping[DeiTConfig] is DeiTModel, "a stand-in has stayed"
"""


def run(program: str, *arguments) -> subprocess.CompletedProcess:
    """In a process of its own: registration is for good."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", f"import sys\n{program}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint of each class, with a processor that does not say which it is."""
    paths = []
    for kind in CLASSES:
        paths.append(tmp_path_factory.mktemp(kind.__name__))
        kind(DeiTConfig(**SIZES)).save_pretrained(paths[-1])
        (paths[-1] / "preprocessor_config.json").write_text('{"do_resize": true}')
    return paths


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_and_pipelines_return_ours(order, folders):
    done = run(ORDERS[order] + USE, *folders)
    assert done.returncode == 0, done.stderr
    expected = [
        line
        for kind in CLASSES
        for line in (f"hf_deit.models.configuration_deit {kind.__name__}", "DeiTImageProcessor")
    ]
    assert done.stdout.splitlines() == [*expected, "hf_deit.models.modeling_deit"]


@pytest.mark.slow
def test_a_spawned_process_that_is_handed_our_config_builds_our_model():
    program = f"""
from multiprocessing import get_context
from transformers import AutoModel
import hf_deit
config = hf_deit.DeiTConfig(**{SIZES})
with get_context('spawn').Pool(1) as pool:
    print(type(pool.apply(AutoModel.from_config, (config,))).__module__)
"""
    done = run(program)
    assert done.stdout == "hf_deit.models.modeling_deit\n", done.stderr


def test_models_that_do_not_register_are_an_error_of_the_import():
    # `register` does nothing, as in some releases.
    program = """
import hf_deit
from transformers.models.auto import auto_factory
auto_factory._LazyAutoMapping.register = lambda *args, **kwargs: None
from transformers import AutoModel
"""
    done = run(program)
    assert done.returncode != 0
    assert "ImportError: this release of transformers did not register" in done.stderr.splitlines()[-1]


def test_a_configuration_that_does_not_register_is_an_error(monkeypatch):
    auto = transformers.models.auto.configuration_auto
    monkeypatch.setattr(auto.CONFIG_MAPPING, "_extra_content", {})
    monkeypatch.setattr(auto.AutoConfig, "register", lambda *args, **kwargs: None)
    with pytest.raises(ImportError, match="did not register hf_deit's classes for model type 'deit'"):
        register_configurations(auto)


def test_auto_classes_leave_vits_to_stock(tmp_path):
    config = transformers.ViTConfig(**SIZES)
    for auto, kind in (
        (transformers.AutoModel, transformers.ViTModel),
        (transformers.AutoModelForImageClassification, transformers.ViTForImageClassification),
    ):
        kind(config).save_pretrained(tmp_path)
        assert type(auto.from_pretrained(tmp_path)) is kind
        assert type(auto.from_config(transformers.ViTConfig(**SIZES))) is kind
        assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is transformers.ViTConfig
    assert (
        transformers.AutoConfig.for_model("vit", hidden_size=24).to_dict()
        == transformers.ViTConfig(hidden_size=24).to_dict()
    )
