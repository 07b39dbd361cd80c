"""Methods that map float weights to float weights and leave the function of the model as it is."""
