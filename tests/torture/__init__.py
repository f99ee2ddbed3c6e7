"""What `make torture` does to a run: kill it anywhere, flip its bits, fill its disk. Seeds are fixed."""
