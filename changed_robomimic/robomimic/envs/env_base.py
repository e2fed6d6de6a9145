"""Kinds of environments, numbered as in the metadata of robomimic's data sets."""


class EnvType:
    """The entry `type` of `env_meta`."""

    ROBOSUITE_TYPE = 1
    GYM_TYPE = 2
    IG_MOMART_TYPE = 3
