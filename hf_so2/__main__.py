"""`python -m hf_so2 train …` and `accelerate launch -m hf_so2 train …`."""

from hf_so2.commands import main

if __name__ == "__main__":
    main()
