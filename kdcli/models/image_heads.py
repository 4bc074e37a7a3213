"""Classifiers of images by the library's own class for them, and on towers: the halves of CLIP that read images.

The library has a classifier on a tower, with the configuration of the whole model, texts and all. Here it has that of
the tower alone, so that it is a model of its family like any other; on disk it is the library's.
"""

import copy
from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedModel

from kdcli.models.families import FAMILIES, Family
from kdcli.models.written import OUTER

__all__ = ["AutoModelForImageClassification"]


def _classifier(family: Family) -> tuple[type, type]:
    """Return the class of a tower's configuration, and that of a classifier on it: the mean over patches, a map."""
    whole = family.part_of
    assert whole is not None
    config_class: Any = type(AutoConfig.for_model(family.name))
    library: Any = AutoModelForImageClassification._model_mapping[type(AutoConfig.for_model(whole.name))]

    body: Any = AutoModel._model_mapping[config_class]

    def start(self: Any, config: Any) -> None:
        for name, value in whole.settings.items():
            setattr(config, name, value)
        PreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        setattr(self, whole.part, body(config))
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def save(self: Any, *arguments: Any, **options: Any) -> None:
        own = self.config
        self.config = _whole(own, family)
        try:
            library.save_pretrained(self, *arguments, **options)
        finally:
            self.config = own

    made = type(
        library.__name__,
        (library,),
        {
            "__init__": start,
            "__module__": __name__,
            "save_pretrained": save,
            "config_class": config_class,
            "config": None,
            "base_model_prefix": whole.part,
        },
    )
    return config_class, made


def _whole(config: Any, family: Family) -> Any:
    """Return the configuration of a whole model around a tower's; what reads texts has the library's usual sizes."""
    assert family.part_of is not None
    inner = copy.deepcopy(config).to_dict()
    outer = {key: getattr(config, key) for key in OUTER if hasattr(config, key) and key not in ("num_labels",)}
    own = {key: value for key, value in inner.items() if key not in OUTER}
    return AutoConfig.for_model(family.part_of.name, **{family.part_of.config: own}, **outer)


for _family in FAMILIES.values():
    if _family.part_of is not None:
        AutoModelForImageClassification.register(*_classifier(_family), exist_ok=True)
