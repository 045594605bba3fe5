package red

import (
	"net"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"trainerd/secloop/scenario"
)

// guessSSH is guess where a real sshd answers. A server that turns every word
// down, or takes no passwords, gives "" like one that says denied.
func guessSSH(c net.Conn, words []string, command string) (string, error) {
	next := 0
	password := ssh.PasswordCallback(func() (string, error) {
		next++
		return words[next-1], nil
	})
	conn, channels, requests, err := ssh.NewClientConn(c, c.RemoteAddr().String(), &ssh.ClientConfig{
		User: scenario.Account, Auth: []ssh.AuthMethod{ssh.RetryableAuthMethod(password, len(words))},
		HostKeyCallback: ssh.InsecureIgnoreHostKey(), // an attacker does not mind, and nothing is kept
		Timeout:         maxTime,
	})
	if err != nil {
		if strings.Contains(err.Error(), "unable to authenticate") {
			err = nil
		}
		return "", err
	}
	client := ssh.NewClient(conn, channels, requests)
	defer client.Close()
	if command == "" {
		return "welcome", nil
	}
	s, err := client.NewSession()
	if err != nil {
		return "welcome", err
	}
	defer s.Close()
	var out answer
	s.Stdout = &out
	c.SetDeadline(time.Now().Add(maxTime))
	err = s.Run(command)
	return "welcome\n" + strings.TrimSpace(string(out)), err
}

// answer keeps the first maxOutput bytes.
type answer []byte

// Write implements io.Writer.
func (a *answer) Write(p []byte) (int, error) {
	*a = append(*a, p[:min(len(p), maxOutput-len(*a))]...)
	return len(p), nil
}
