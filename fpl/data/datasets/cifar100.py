"""CIFAR-100 (Krizhevsky, 2009)."""

from fpl.data.datasets.layouts import Dataset, File, cifar

BATCHES = cifar(
    train=["cifar-100-python/train"],
    test="cifar-100-python/test",
    meta="cifar-100-python/meta",
    names="fine_label_names",
    labels="fine_labels",
)

DATASET = Dataset(
    key="cifar100",
    title="CIFAR100",
    position=7,
    folders=("cifar100", "cifar-100"),
    classes=100,
    layouts={"torchvision": BATCHES},
    page="https://www.cs.toronto.edu/~kriz/cifar.html",
    terms="No licence is stated; the authors ask for a citation of their report.",
    files=(
        File(
            "cifar100/cifar-100-python.tar.gz",
            "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
            size=169001437,
            md5="eb9058c3a382ffc7106e4002c42a8d85",
        ),
    ),
)
