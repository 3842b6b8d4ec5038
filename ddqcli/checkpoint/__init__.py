"""Read the weights in a checkpoint file, and build the network that they belong to.

Three readers, because importing PyTorch costs a second and a large file may not fit in memory:

    read.py       the whole state dict as PyTorch tensors, checked and ready to be loaded into a
                  network: for training. torch_load.py is its `torch.load` that runs no code.
    torch_zip.py  the byte positions of the tensors in a `torch.save` file, without PyTorch.
    tensors.py    one tensor after the other as float32 chunks, so that memory stays bounded: for
                  `ddq inspect`. Reads safetensors (safetensors_header.py) and `torch.save` files
                  without PyTorch (chunks.py), and any other file through read.py.

All of them find the state dict with state_keys.py. architecture.py then builds the network: by
torchvision's name (torchvision_models.py), from the configuration of a network of transformers
(transformers_models.py), by a factory, from the pickled module in the file, or
by recognizing torchvision's keys and shapes. state_fit.py loads the weights into it.
"""
