"""Backbones of timm and transformers for mmsegmentation, offline by default."""
from typing import Any

import torch
from mmengine.model import BaseModule
from mmseg.models.backbones import TIMMBackbone
from mmseg.registry import MODELS
from torch import Tensor

from ...errors import ConfigError
from ..layers import channels_last


@MODELS.register_module()
class TimmMaps(TIMMBackbone):
    """mmseg's TIMMBackbone, with checked names and no download unless asked for.

    For models that give maps N x C x H x W at any image size, such as DaViT, MViTv2 and PVTv2.

    Args:
        model_name: timm's name of the model.
        pretrained: Load timm's ImageNet weights, from its cache or the network.
        kwargs: Arguments of mmseg's TIMMBackbone and of the model, such as ``drop_path_rate``.

    Raises:
        ConfigError: timm is missing, or has no such model.
    """

    def __init__(self, model_name: str, pretrained: bool = False, **kwargs: Any) -> None:
        try:
            import timm
        except ImportError as error:
            raise ConfigError(f'{model_name} comes from timm: python -m pip install '
                              'timm') from error
        if not timm.is_model(model_name):
            raise ConfigError(f"timm {timm.__version__} has no model '{model_name}': see "
                              'timm.list_models()')
        super().__init__(model_name, pretrained=pretrained, **kwargs)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps of the stages, N x C x H x W, channels-last."""
        return tuple(channels_last(x) for x in super().forward(channels_last(x)))


@MODELS.register_module()
class TransformersMaps(BaseModule):
    """A backbone of transformers whose hidden states are maps, such as CvT.

    Args:
        model_type: The library's name of the architecture, such as 'cvt'.
        pretrained: Name or folder of weights for ``from_pretrained``, such as 'microsoft/cvt-13';
            None for random ones.
        init_cfg: mmengine's initialisation.
        config: Sizes that replace those of the architecture's configuration.

    Raises:
        ConfigError: transformers is missing, the weights are of another architecture, or (at the
            first image) the architecture gives no maps.
    """

    def __init__(self, model_type: str, pretrained: str | None = None,
                 init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
                 **config: Any) -> None:
        super().__init__(init_cfg)
        try:
            from transformers import AutoConfig, AutoModel
        except ImportError as error:
            raise ConfigError(f"'{model_type}' comes from transformers: python -m pip install "
                              'transformers') from error
        if pretrained is None:
            self.model = AutoModel.from_config(AutoConfig.for_model(model_type, **config))
        else:
            self.model = AutoModel.from_pretrained(pretrained, **config)
            self._is_init = True
        if self.model.config.model_type != model_type:
            raise ConfigError(f"pretrained='{pretrained}' is a {self.model.config.model_type}, "
                              f"not a {model_type}")
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Maps of the stages, N x C x H x W, channels-last."""
        maps = self.model(x, output_hidden_states=True).hidden_states
        if maps[0].dim() != 4:
            raise ConfigError(f'the hidden states of {type(self.model).__name__} are tokens, not '
                              'maps: use a model with stages of maps, such as cvt or segformer')
        return tuple(channels_last(x) for x in maps)
