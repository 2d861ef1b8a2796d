from pixart.commands import run

if __name__ == "__main__":
    run("convert")
