from methods.command import main

raise SystemExit(main())
