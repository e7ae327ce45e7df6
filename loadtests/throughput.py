"""`python -m loadtests.throughput`: the short name of `loadtests.gpu.throughput`."""

from loadtests.gpu.throughput import main

if __name__ == "__main__":
    main()
