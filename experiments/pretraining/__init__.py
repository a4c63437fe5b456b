"""Pre-training of vggt-nano from random weights, and the page that describes the weights."""
