package blue

import (
	"bufio"
	"fmt"
	"net"
	"strings"

	"trainerd/secloop/scenario"
)

// serveStore speaks the inline form of RESP: one command a line.
func (b *Blue) serveStore(c net.Conn, h scenario.Host) {
	authenticated, dir := false, "/var/lib/store"
	r := bufio.NewReaderSize(c, 256)
	for {
		line, err := readLine(r)
		if err != nil {
			return
		}
		words := strings.Fields(line)
		if len(words) == 0 {
			return
		}
		command := strings.ToUpper(words[0])
		if command == "QUIT" {
			fmt.Fprint(c, "+OK\r\n")
			return
		}
		if command == "AUTH" {
			authenticated = len(words) == 2 && words[1] == StorePassword
			fmt.Fprint(c, "+OK\r\n")
			continue
		}
		if !authenticated {
			b.log("store", peer(c), h.Name, line)
			if b.Is(h.Name, scenario.RequireAuth) {
				fmt.Fprint(c, "-NOAUTH Authentication required.\r\n")
				continue
			}
		}
		switch {
		case command == "PING":
			fmt.Fprint(c, "+PONG\r\n")
		case command == "CONFIG" && len(words) == 4 && strings.EqualFold(words[1], "SET") && words[2] == "dir":
			dir = words[3]
			fmt.Fprint(c, "+OK\r\n")
		case command == "SET" && len(words) == 3:
			fmt.Fprint(c, "+OK\r\n")
		case command == "CONFIG" && len(words) == 3 && strings.EqualFold(words[1], "GET") && words[2] == "dir":
			fmt.Fprintf(c, "*2\r\n$3\r\ndir\r\n$%d\r\n%s\r\n", len(dir), dir)
		case command == "SAVE": // nothing is written
			fmt.Fprint(c, "+OK\r\n")
		case command == "SLAVEOF" && len(words) == 3: // nobody is followed
			fmt.Fprint(c, "+OK\r\n")
		case command == "MODULE" && len(words) == 3 && strings.EqualFold(words[1], "LOAD"): // nothing is loaded
			fmt.Fprint(c, "+OK loaded\r\n")
		case command == "KEYS", command == "SCAN":
			fmt.Fprint(c, "+records sessions\r\n")
		case (command == "DUMP" || command == "GET") && len(words) == 2 && words[1] == "records":
			fmt.Fprintf(c, "+%s\r\n", b.run(h, "cat /secret"))
		default:
			fmt.Fprint(c, "-ERR unknown command\r\n")
		}
	}
}
