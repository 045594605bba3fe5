package blue

import (
	"bufio"
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
	r := bufio.NewReaderSize(c, 256)
	fmt.Fprintf(c, "220 %s of %s\r\n", h.Service, h.Name)
	for n := 0; n < maxGuesses; n++ {
		line, err := readLine(r)
		if err != nil {
			return
		}
		how, word, _ := strings.Cut(line, " ")
		password := b.ep.Password
		if b.Is(h.Name, scenario.PasswordRotated) {
			password = RotatedPassword
		}
		ok := how == "KEY" && word == UserKey || how == "PASS" && word == password && !b.Is(h.Name, scenario.KeysOnly)
		if !ok {
			b.log("login_failed", peer(c), h.Name, how)
			fmt.Fprint(c, "denied\r\n")
			continue
		}
		fmt.Fprint(c, "welcome\r\n")
		if line, err = readLine(r); err != nil {
			return
		}
		switch command, _ := strings.CutPrefix(line, "RUN "); {
		case command == "put implant" && h.Service == scenario.Share:
			b.log("upload", peer(c), h.Name, "implant")
			fmt.Fprint(c, "stored implant\r\n")
		case h.Service == scenario.Share && strings.Contains(command, " "):
			fmt.Fprintf(c, "%s\r\n", b.share(h, command))
		default:
			fmt.Fprintf(c, "%s\r\n", b.run(h, command))
		}
		return
	}
}

// share answers what one does with folders.
func (b *Blue) share(h scenario.Host, command string) string {
	verb, folder, _ := strings.Cut(command, " ")
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case verb == "list":
		return folder + ": 64 files"
	case verb == "archive" && len(b.archived) < 64:
		b.archived[folder] = true
		return "archived 64 files of " + folder
	case verb == "get" && b.archived[folder]:
		return b.run(h, "cat /secret")
	}
	return "no such folder"
}
