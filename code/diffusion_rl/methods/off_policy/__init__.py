"""Fine-tuning from a replay buffer: DRWR, DAWR, DIPO, IDQL, DQL, QSM, DACER, SAC, RLPD, IBRL, Cal-QL."""
