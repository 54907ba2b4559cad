from penstock.broadcast.member import main

if __name__ == "__main__":
    main()
