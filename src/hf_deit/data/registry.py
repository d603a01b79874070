"""Facts about the datasets of the paper and a few more.

Not here: loading the images (loading.py).

Source: sizes and numbers of classes are those of Table 6 of the paper (arXiv 2012.12877), else of the dataset's page.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..augmentation.transforms import IMAGENET_MEAN, IMAGENET_STD
from . import official_layouts


@dataclass(frozen=True, kw_only=True)
class RegisteredDataset:
    """The facts of one dataset.

    Attributes:
        num_classes: number of classes at the finest level.
        train_size: number of training images; None for a dataset that is only for evaluation.
        eval_size: number of evaluation images.
        released_sizes: training and evaluation images of the released files, if they are known to differ from Table 6.
        train_split: official splits to train on, joined with "+"; None for a dataset that is only for evaluation.
        eval_split: official split to evaluate on.
        page: web page of the dataset, or the page for accepting its terms.
        layout: layout of the official directory.
        hub_id: repository on the Hub; None if no repository is known to be complete and correct.
        image_column, label_column: columns of the repository on the Hub.
        gated: true if the Hub requires accepting terms first.
        licence: the licence according to the authors of the dataset, in a few words.
        class_names: names in the order of the labels, if the official files do not contain them.
        classes_of: registered dataset whose class i is class i here, if the class names do not show it.
        image_mean, image_std: per channel, for pixels in [0, 1]. The paper fine-tunes with ImageNet's everywhere.
    """

    num_classes: int
    train_size: int | None
    eval_size: int
    released_sizes: tuple[int, int] | None = None
    train_split: str | None = "train"
    eval_split: str = "test"
    page: str
    layout: official_layouts.Layout
    hub_id: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    gated: bool = False
    licence: str
    class_names: tuple[str, ...] | None = None
    classes_of: str | None = None
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD


RESEARCH_ONLY = "non-commercial research and education"

# www.robots.ox.ac.uk/~vgg/data/flowers/102/categories.html; imagelabels.mat counts the classes from 1
# fmt: off
FLOWER_NAMES = (
    "pink primrose", "hard-leaved pocket orchid", "canterbury bells", "sweet pea", "english marigold", "tiger lily",
    "moon orchid", "bird of paradise", "monkshood", "globe thistle", "snapdragon", "colt's foot", "king protea",
    "spear thistle", "yellow iris", "globe-flower", "purple coneflower", "peruvian lily", "balloon flower",
    "giant white arum lily", "fire lily", "pincushion flower", "fritillary", "red ginger", "grape hyacinth",
    "corn poppy", "prince of wales feathers", "stemless gentian", "artichoke", "sweet william", "carnation",
    "garden phlox", "love in the mist", "mexican aster", "alpine sea holly", "ruby-lipped cattleya", "cape flower",
    "great masterwort", "siam tulip", "lenten rose", "barbeton daisy", "daffodil", "sword lily", "poinsettia",
    "bolero deep blue", "wallflower", "marigold", "buttercup", "oxeye daisy", "common dandelion", "petunia",
    "wild pansy", "primula", "sunflower", "pelargonium", "bishop of llandaff", "gaura", "geranium", "orange dahlia",
    "pink-yellow dahlia?", "cautleya spicata", "japanese anemone", "black-eyed susan", "silverbush",
    "californian poppy", "osteospermum", "spring crocus", "bearded iris", "windflower", "tree poppy", "gazania",
    "azalea", "water lily", "rose", "thorn apple", "morning glory", "passion flower", "lotus", "toad lily",
    "anthurium", "frangipani", "clematis", "hibiscus", "columbine", "desert-rose", "tree mallow", "magnolia",
    "cyclamen", "watercress", "canna lily", "hippeastrum", "bee balm", "ball moss", "foxglove", "bougainvillea",
    "camellia", "mallow", "mexican petunia", "bromelia", "blanket flower", "trumpet creeper", "blackberry lily",
)
# fmt: on

REGISTRY = {
    "imagenet-1k": RegisteredDataset(
        num_classes=1000,
        train_size=1_281_167,
        eval_size=50_000,
        eval_split="validation",
        page="https://huggingface.co/datasets/ILSVRC/imagenet-1k",
        layout=official_layouts.IMAGENET,
        hub_id="ILSVRC/imagenet-1k",
        gated=True,
        licence=RESEARCH_ONLY,
    ),
    # arXiv 1902.10811: ten images of each class
    "imagenet-v2": RegisteredDataset(
        num_classes=1000,
        train_size=None,
        eval_size=10_000,
        train_split=None,
        page="https://huggingface.co/datasets/vaishaal/ImageNetV2",  # archives of folders, not a dataset with columns
        layout=official_layouts.IMAGENET_V2,
        licence="as ImageNet's; images from Flickr",
        class_names=tuple(map(str, range(1000))),
        classes_of="imagenet-1k",
    ),
    # arXiv 2006.07159: ImageNet's validation images with new labels, any number per image
    "imagenet-real": RegisteredDataset(
        num_classes=1000,
        train_size=None,
        eval_size=50_000,
        train_split=None,
        eval_split="validation",
        page="https://github.com/google-research/reassessed-imagenet",
        layout=official_layouts.IMAGENET_REAL,
        licence="labels Apache 2.0, images as ImageNet's",
        class_names=tuple(map(str, range(1000))),
        classes_of="imagenet-1k",
    ),
    "cifar10": RegisteredDataset(
        num_classes=10,
        train_size=50_000,
        eval_size=10_000,
        page="https://www.cs.toronto.edu/~kriz/cifar.html",
        layout=official_layouts.CIFAR10,
        hub_id="uoft-cs/cifar10",
        image_column="img",
        licence="not stated",
    ),
    "cifar100": RegisteredDataset(
        num_classes=100,
        train_size=50_000,
        eval_size=10_000,
        page="https://www.cs.toronto.edu/~kriz/cifar.html",
        layout=official_layouts.CIFAR100,
        hub_id="uoft-cs/cifar100",
        image_column="img",
        label_column="fine_label",
        licence="not stated",
    ),
    "flowers102": RegisteredDataset(
        num_classes=102,
        train_size=2_040,
        eval_size=6_149,
        train_split="train+validation",
        page="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        layout=official_layouts.FLOWERS102,
        hub_id="dpdl-benchmark/oxford_flowers102",
        licence="not stated",
        class_names=FLOWER_NAMES,
    ),
    # The makers' own page is gone.
    "cars": RegisteredDataset(
        num_classes=196,
        train_size=8_144,
        eval_size=8_041,
        page="https://huggingface.co/datasets/tanganke/stanford_cars",
        layout=official_layouts.CARS,
        hub_id="tanganke/stanford_cars",
        licence=RESEARCH_ONLY,
    ),
    "inat18": RegisteredDataset(
        num_classes=8_142,
        train_size=437_513,
        eval_size=24_426,
        eval_split="validation",
        page="https://github.com/visipedia/inat_comp/tree/master/2018",
        layout=official_layouts.INATURALIST_2018,
        licence=RESEARCH_ONLY,
    ),
    # Table 6 and the competition's files share the sum of 268,243; the files have three validation images a class.
    "inat19": RegisteredDataset(
        num_classes=1_010,
        train_size=265_240,
        eval_size=3_003,
        released_sizes=(265_213, 3_030),
        eval_split="validation",
        page="https://github.com/visipedia/inat_comp/tree/master/2019",
        layout=official_layouts.INATURALIST_2019,
        licence=RESEARCH_ONLY,
    ),
    # arXiv 1708.07747
    "fashion-mnist": RegisteredDataset(
        num_classes=10,
        train_size=60_000,
        eval_size=10_000,
        page="https://github.com/zalandoresearch/fashion-mnist",
        layout=official_layouts.FASHION_MNIST,
        hub_id="zalando-datasets/fashion_mnist",
        licence="MIT",
        # spelled as on the Hub
        class_names=(
            *("T - shirt / top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ),
    ),
    # One fifth of scikit-learn's 1,797 is held out.
    "digits": RegisteredDataset(
        num_classes=10,
        train_size=1_437,
        eval_size=360,
        page="https://scikit-learn.org/stable/datasets/toy_dataset.html",
        layout=official_layouts.DIGITS,
        licence="CC BY 4.0",
        class_names=tuple(map(str, range(10))),
    ),
}
