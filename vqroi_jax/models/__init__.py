"""Networks, as Linen modules. They know no losses and no training."""
