"""What a person reads: made from the results alone, so that it can be made again later."""
