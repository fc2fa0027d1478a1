"""What makes a step of the decoding loop quick on a GPU."""
