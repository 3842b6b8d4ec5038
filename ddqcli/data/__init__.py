"""Training and evaluation data as repeatable, resumable batches on the device.

load.py opens the data that a recipe names: image_folder.py, npz.py and torchvision_sets.py give a
Source of images, data_factory.py gives a user's own data. image_format.py chooses size and
colors, images.py reads images in that format, augment.py turns batches of them into input.
batches.py is the contract of batches; memory_batches.py, loaded_batches.py and ready_batches.py
fulfill it. held_out.py chooses the training samples to hold out. classification.py is the default
loss and metric.
"""
