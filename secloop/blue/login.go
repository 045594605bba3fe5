package blue

import (
	"fmt"
	"net"
	"strings"

	"trainerd/secloop/scenario"
)

const maxGuesses = 3 // per connection

// UserKey is how legitimate clients log in.
const UserKey = "key-of-users"

// serveLogin is the remote login and the file share: "PASS word" or "KEY key",
// then one command ("RUN command").
func (b *Blue) serveLogin(c net.Conn, h scenario.Host) {
	fmt.Fprintf(c, "220 %s of %s\r\n", h.Service, h.Name)
	for n := 0; n < maxGuesses; n++ {
		line, err := readLine(c)
		if err != nil {
			return
		}
		how, word, _ := strings.Cut(line, " ")
		password := b.ep.Password
		if b.Is(h.Name, scenario.PasswordRotated) {
			password = rotated
		}
		ok := how == "KEY" && word == UserKey || how == "PASS" && word == password && !b.Is(h.Name, scenario.KeysOnly)
		if !ok {
			b.log("login_failed", peer(c), h.Name, how)
			fmt.Fprint(c, "denied\r\n")
			continue
		}
		fmt.Fprint(c, "welcome\r\n")
		if line, err = readLine(c); err != nil {
			return
		}
		switch command, _ := strings.CutPrefix(line, "RUN "); {
		case command == "put implant" && h.Service == scenario.Share:
			b.log("upload", peer(c), h.Name, "implant")
			fmt.Fprint(c, "stored implant\r\n")
		default:
			fmt.Fprintf(c, "%s\r\n", b.run(h, command))
		}
		return
	}
}
