"""check.py: the dataset of a directory, a name or a recipe is checked without training."""

import pytest
from support.images import write_image

from hf_deit.commands import check


@pytest.fixture
def photos(tmp_path):
    for name in ("cat", "dog"):
        for number in range(10):
            write_image(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def test_a_directory_a_recipe_and_a_name_are_checked(photos, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model_size: tiny\ndataset_name: {photos}\nimage_size: 32\nnum_train_epochs: 30\n")
    texts = [check.main(words) for words in ([str(photos)], [str(recipe)], ["--dataset_name", str(photos)])]
    assert len(set(texts)) == 1 and capsys.readouterr().out.count(texts[0]) == 3
    assert "16 images" in texts[0] and "4 images: 4 of the 20" in texts[0]
    assert "1,437 images" in check.main(["digits"])
    assert "8 images" in check.main([str(photos), "--eval_fraction", "0.6"])


def test_what_a_run_could_not_use_is_refused(photos, tmp_path):
    with pytest.raises(ValueError, match="no images found"):
        check.main([str(tmp_path / "photos" / "cat")])
    with pytest.raises(ValueError, match="eval_fracton.*did you mean"):
        check.main([str(photos), "--eval_fracton", "0.2"])
