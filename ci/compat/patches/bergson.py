"""Our functions in bergson's modules, and the two fixtures that its source distribution leaves out."""

import bergson.collector.collector
import bergson.collector.projection_matrix
import bergson.hessians.apply_hessian
import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from pyattr.compat.bergson import project_global, random_matrix

bergson.collector.projection_matrix.random_matrix = random_matrix
bergson.collector.collector.random_matrix = random_matrix
bergson.collector.collector.project_global = project_global
bergson.hessians.apply_hessian.project_global = project_global


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=32, hidden_size=8, intermediate_size=32, num_attention_heads=4, num_hidden_layers=2
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.fixture
def dataset():
    sequences = [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [3, 1, 4, 1, 5]]
    return Dataset.from_dict({"input_ids": sequences, "labels": sequences, "attention_mask": [[1] * 5] * 3})
