"""A pretrained backbone on real images: two domains of Office-Caltech as two tasks."""

import zipfile

import keras
import numpy as np
import pytest
from keras import ops

from dmtrl_keras import factorization_report, multitask, single_task, zip_tasks
from dmtrl_keras.ground.backend import tensorflow

DOMAINS = ["dslr", "webcam"]
SIZE = 128


@pytest.fixture(scope="module")
def domains(data_dir, tmp_path_factory):
    """`(images, labels)` of each domain, as the pretrained network wants them."""
    folder = tmp_path_factory.mktemp("office")
    with zipfile.ZipFile(data_dir / "office_caltech10.zip") as archive:
        wanted = [n for n in archive.namelist() if n.split("/")[1:2][0] in DOMAINS]
        archive.extractall(folder, wanted)
    found = {}
    for domain in DOMAINS:
        data = keras.utils.image_dataset_from_directory(
            folder / "office_caltech10" / domain,
            image_size=(SIZE, SIZE),
            batch_size=None,
            shuffle=False,
            verbose=False,
        )
        images, labels = zip(*data.as_numpy_iterator())
        found[domain] = (np.stack(images) - 127) / 128, np.array(labels)
    return found


@pytest.fixture(scope="module")
def backbone(data_dir):
    """The features of EfficientNet-Lite0, for smaller images than it was trained on."""
    path = data_dir / "weights" / "efficientnet_lite0_imagenet.keras"
    whole = keras.saving.load_model(path)
    features = keras.Model(whole.input, whole.get_layer("avg_pool").output)
    smaller = keras.models.clone_model(features, input_tensors=keras.Input((SIZE, SIZE, 3)))
    smaller.set_weights(features.get_weights())
    return smaller


def accuracy(model, images, labels):
    """The fraction of images whose most probable class is theirs."""
    return np.mean(model.predict(images, verbose=0).argmax(-1) == labels)


@pytest.mark.long
def test_tucker_on_two_domains(domains, backbone, rng, tmp_path):
    """Trains, beats chance by far, and ships a network for one domain."""
    if keras.config.backend() != "tensorflow":
        pytest.skip("the images are read with TensorFlow")
    model = multitask(
        backbone,
        DOMAINS,
        sharing="tucker",
        tolerance=0.1,
        share_until="_blocks.13.add",
        shared_input=False,
        heads=10,
        verbose=False,
    )
    report = factorization_report(model)
    assert all(entry.error <= 0.1 for entry in report)
    assert {entry.rank[-1] for entry in report} == {2}
    # As usual in fine-tuning: the shared trunk and the batch statistics stay.
    after = {"blocks.14", "blocks.15", "conv_head", "dslr_head", "webcam_head"}
    for layer in model.layers:
        layer.trainable = layer.name.startswith(tuple(after)) and not isinstance(
            layer, keras.layers.BatchNormalization
        )
    train, test = {}, {}
    for domain, (images, labels) in domains.items():
        order = rng.permutation(len(images))
        half = len(order) // 2
        train[domain] = images[order[:half]], labels[order[:half]]
        test[domain] = images[order[half:]], labels[order[half:]]
    model.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy")
    stream = zip_tasks(train, batch_size=16, seed=0)
    history = model.fit(stream, epochs=4, verbose=0).history["loss"]
    assert history[-1] < 0.5 * history[0]
    for domain, (images, labels) in test.items():
        alone = single_task(model, domain)
        # Chance is 0.1.
        assert accuracy(alone, images, labels) > 0.8
        both = {name: images for name in DOMAINS}
        expected = model.predict(both, verbose=0)[domain]
        predicted = alone.predict(images, verbose=0)
        np.testing.assert_allclose(predicted, expected, atol=1e-4)
        np.testing.assert_array_equal(predicted.argmax(-1), expected.argmax(-1))
        alone.export(tmp_path / domain, verbose=False)
        loaded = tensorflow().saved_model.load(str(tmp_path / domain))
        classes = ops.convert_to_numpy(loaded.serve(images)).argmax(-1)
        np.testing.assert_array_equal(classes, expected.argmax(-1))
