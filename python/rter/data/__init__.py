"""Image data sets in [0, 1]. This list of them imports none, and so not torch."""

DATASETS = {  # load(folder, image_size) of each; 0 takes images in files of their own as they are
    "digits": "rter.data.digits:load",
    "cifar10": "rter.data.cifar10:load",
    "svhn": "rter.data.svhn:load",
    "tiny-imagenet": "rter.data.folders:load_tiny_imagenet",
    "image-folder": "rter.data.folders:load_image_folder",
}
