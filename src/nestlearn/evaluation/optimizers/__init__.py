"""What the optimizers are good for: small models, the toy of Eq. 53, and tasks that should not disturb each other."""
