"""What the process that `commands.Started` forks from has imported already."""

import gc

import onnxruntime.transformers.float16
import sentence_transformers.sentence_transformer.training_args
import tensorboard.summary.writer.event_file_writer
import torch.utils.tensorboard

import common.training

gc.freeze()  # what is forked need not look through all that is imported

__all__ = ["common", "onnxruntime", "sentence_transformers", "tensorboard", "torch"]
