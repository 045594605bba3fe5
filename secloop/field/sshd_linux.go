package field

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"trainerd/secloop/blue"
	"trainerd/secloop/scenario"
)

// Where Debian puts them; perl-base is part of every installation.
const (
	sshdPath = "/usr/sbin/sshd"
	perlPath = "/usr/bin/perl"
)

// Users of sshd's user namespace: its root, who is nobody outside it, the user
// of its unprivileged half, and the account.
const (
	jailUsers   = 65520 // uid and gid outside of the first
	jailPrivsep = 1
	jailAccount = 1000
)

const sshdConfig = `ListenAddress %s
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/authorized_keys
AllowUsers ` + scenario.Account + `
PasswordAuthentication yes
KbdInteractiveAuthentication no
PermitRootLogin no
UsePAM no
StrictModes no
DisableForwarding yes
PermitTTY no
PrintMotd no
PrintLastLog no
UseDNS no
PidFile none
MaxStartups 100
LogLevel INFO
`

// sshd is the real remote login of one host. It runs as root of a user
// namespace of its own, which is an unprivileged user outside, because it checks
// passwords and changes users as root only; in blue's network namespace, with
// its own pid namespace and a root of its own out of a tmpfs and /usr.
type sshd struct {
	host    scenario.Host
	cmd     *exec.Cmd
	log     int    // the read end of its standard error, not blocking
	text    []byte // what was read of it beyond the last line
	user    ssh.Signer
	hostKey ssh.PublicKey
}

// jail is what the supervisor of an episode tells the role that becomes sshd.
type jail struct {
	Files     map[string]string // by path
	Passwords []string          // the weak one, then the one that rotate_credentials sets
}

// startLogin starts sshd in the network namespace of a process. It must not be
// called by two at a time.
func startLogin(ep scenario.Episode, bluePid int) (*sshd, error) {
	h, _ := scenario.HostByName("jump1")
	s := &sshd{host: h}
	secret := "nothing here"
	if h.Name == ep.Target.Name {
		secret = ep.Secret
	}
	hostPublic, hostPrivate, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	block, err := ssh.MarshalPrivateKey(hostPrivate, "")
	if err != nil {
		return nil, err
	}
	if s.hostKey, err = ssh.NewPublicKey(hostPublic); err != nil {
		return nil, err
	}
	_, userPrivate, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	if s.user, err = ssh.NewSignerFromKey(userPrivate); err != nil {
		return nil, err
	}
	arg, err := json.Marshal(jail{Files: map[string]string{
		"/secret":                  secret + "\n",
		"/etc/passwd":              fmt.Sprintf("root:x:0:0::/:/bin/false\nsshd:x:%d:%d::/run/sshd:/bin/false\n%s:x:%d:%d::/:/bin/sh\n", jailPrivsep, jailPrivsep, scenario.Account, jailAccount, jailAccount),
		"/etc/group":               fmt.Sprintf("root:x:0:\nsshd:x:%d:\n%s:x:%d:\n", jailPrivsep, scenario.Account, jailAccount),
		"/etc/nsswitch.conf":       "passwd: files\ngroup: files\nshadow: files\n",
		"/etc/ssh/host_key":        string(pem.EncodeToMemory(block)),
		"/etc/ssh/authorized_keys": string(ssh.MarshalAuthorizedKey(s.user.PublicKey())),
		"/etc/ssh/sshd_config":     fmt.Sprintf(sshdConfig, h.At()),
	}, Passwords: []string{ep.Password, blue.RotatedPassword}})
	if err != nil {
		return nil, err
	}
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(pipe[0], true); err != nil {
		return nil, err
	}
	// Nobody reads while an attack runs: room for more than an episode can fill.
	if _, err := unix.FcntlInt(uintptr(pipe[0]), unix.F_SETPIPE_SZ, 1<<20); err != nil {
		return nil, fmt.Errorf("make room for the log of sshd: %w", err)
	}
	s.log = pipe[0]
	w := os.NewFile(uintptr(pipe[1]), "log of sshd")
	ids := []syscall.SysProcIDMap{
		{ContainerID: 0, HostID: jailUsers, Size: 1}, {ContainerID: jailPrivsep, HostID: jailUsers + 1, Size: 1}, {ContainerID: jailAccount, HostID: jailUsers + 2, Size: 1},
	}
	s.cmd = again(roleLogin, nil, nil, nil)
	s.cmd.Stdin, s.cmd.Stderr = bytes.NewReader(arg), w
	s.cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		UidMappings: ids, GidMappings: ids, GidMappingsEnableSetgroups: true,
		Credential: &syscall.Credential{},
		Setsid:     true,
	}
	err = startIn(bluePid, s.cmd)
	w.Close()
	if err != nil {
		return nil, fmt.Errorf("start sshd: %w", err)
	}
	return s, s.await(func() error { return s.login(scenario.UserAddrs()[0], stand{patience: patience}) })
}

// startIn starts a command in the network namespace of a process. The thread
// that went there comes back, or ends.
func startIn(pid int, cmd *exec.Cmd) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		done <- func() error {
			home, err := netns.Get()
			if err != nil {
				return err
			}
			defer home.Close()
			there, err := netns.GetFromPid(pid)
			if err != nil {
				return err
			}
			defer there.Close()
			if err := netns.Set(there); err != nil {
				return err
			}
			err = cmd.Start()
			if back := netns.Set(home); back != nil {
				return errors.Join(err, back)
			}
			runtime.UnlockOSThread()
			return err
		}()
	}()
	return <-done
}

// await tries until it goes well.
func (s *sshd) await(try func() error) error {
	var err error
	for end := time.Now().Add(toolTimeout); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
		if err = try(); err == nil {
			return nil
		}
	}
	said, _ := s.read()
	return fmt.Errorf("sshd of %s: %w (it says %.300q)", s.host.Name, err, said)
}

// connect logs in from an address.
func (s *sshd) connect(from stand, src netip.Addr, auth ssh.AuthMethod) (*ssh.Client, error) {
	c, err := from.Dial(context.Background(), src, s.host.At())
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(patience))
	conn, channels, requests, err := ssh.NewClientConn(c, s.host.At().String(), &ssh.ClientConfig{
		User: scenario.Account, Auth: []ssh.AuthMethod{auth}, HostKeyCallback: ssh.FixedHostKey(s.hostKey)})
	if err != nil {
		c.Close()
		return nil, err
	}
	return ssh.NewClient(conn, channels, requests), nil
}

// login is a legitimate client: it shows its key and runs a command.
func (s *sshd) login(src netip.Addr, from stand) error {
	out, err := s.run(src, from, "id")
	if err == nil && !strings.Contains(out, "uid=") {
		err = fmt.Errorf("id answers %.40q", out)
	}
	return err
}

// run is one command of somebody with the users' key.
func (s *sshd) run(src netip.Addr, from stand, command string) (string, error) {
	client, err := s.connect(from, src, ssh.PublicKeys(s.user))
	if err != nil {
		return "", err
	}
	defer client.Close()
	session, err := client.NewSession()
	if err != nil {
		return "", err
	}
	defer session.Close()
	out, err := session.Output(command)
	return string(out), err
}

// tryEscapes fails when whoever has logged in can reach one of the canaries, sees
// more than sshd's own root, or can write or mount something there.
func (s *sshd) tryEscapes(canaries []string, from stand) error {
	src := scenario.UserAddrs()[0]
	const root = "bin\ndev\netc\nlib\nlib64\nrun\nsbin\nsecret\nusr\n"
	if out, err := s.run(src, from, "ls -A /"); err != nil || out != root {
		return fmt.Errorf("login: sees %q (%v)", out, err)
	}
	tries := []string{"echo x >/etc/x", "echo x >/usr/x", "cat /etc/shadow", "mount -t tmpfs x /run", "ls /proc/1"}
	for _, at := range canaries {
		if name, abstract := strings.CutPrefix(at, "@"); abstract {
			tries = append(tries, fmt.Sprintf(`perl -MSocket -e 'socket(S,AF_UNIX,SOCK_STREAM,0);exit !connect(S,pack_sockaddr_un("\0%s"))'`, name))
		} else if host, port, err := net.SplitHostPort(at); err == nil {
			tries = append(tries, fmt.Sprintf("bash -c 'exec 3<>/dev/tcp/%s/%s'", host, port))
		}
	}
	for _, command := range tries {
		var exit *ssh.ExitError
		if _, err := s.run(src, from, command); !errors.As(err, &exit) {
			return fmt.Errorf("login: %s: escaped (%v)", command, err)
		}
	}
	return nil
}

// users is blue.Users.
func (s *sshd) users(from stand, n int) int {
	var served atomic.Int32
	var wg sync.WaitGroup
	addrs := scenario.UserAddrs()
	for i := range n {
		wg.Go(func() {
			if s.login(addrs[i%len(addrs)], from) == nil {
				served.Add(1)
			}
		})
	}
	wg.Wait()
	return int(served.Load())
}

// visit is blue.Visit: it says in SSH what the visit says in the words of our own service.
func (s *sshd) visit(from stand, v scenario.Visit) {
	if strings.HasPrefix(v.Say, "KEY ") {
		s.login(v.From, from) // whether it was answered does not matter
		return
	}
	var words []string
	for line := range strings.Lines(v.Say) {
		words = append(words, strings.TrimSpace(strings.TrimPrefix(line, "PASS ")))
	}
	s.passwords(from, v.From, words)
}

// passwords tries them on one connection.
func (s *sshd) passwords(from stand, src netip.Addr, words []string) error {
	next := 0
	client, err := s.connect(from, src, ssh.RetryableAuthMethod(ssh.PasswordCallback(func() (string, error) {
		next++
		return words[next-1], nil
	}), len(words)))
	if err == nil {
		client.Close()
	}
	return err
}

// inside is a file of sshd's own root.
func (s *sshd) inside(path string) string {
	return filepath.Join("/proc", strconv.Itoa(s.cmd.Process.Pid), "root", path)
}

// set makes a setting real and probes that it holds.
func (s *sshd) set(ep scenario.Episode, setting string) error {
	here := stand{patience: patience}
	src := scenario.UserAddrs()[0]
	switch setting {
	case scenario.KeysOnly:
		config := strings.Replace(fmt.Sprintf(sshdConfig, s.host.At()), "PasswordAuthentication yes", "PasswordAuthentication no", 1)
		if err := os.WriteFile(s.inside("/etc/ssh/sshd_config"), []byte(config), 0o600); err != nil {
			return err
		}
		if err := s.cmd.Process.Signal(syscall.SIGHUP); err != nil {
			return err
		}
		return s.await(func() error {
			err := s.passwords(here, src, []string{ep.Password})
			if err == nil || !strings.Contains(err.Error(), "attempted methods [none],") {
				return fmt.Errorf("passwords are still taken (%v)", err)
			}
			return s.login(src, here)
		})
	case scenario.PasswordRotated:
		line, err := os.ReadFile(s.inside("/etc/shadow.rotated"))
		if err != nil {
			return err
		}
		if err := os.WriteFile(s.inside("/etc/shadow"), line, 0o600); err != nil {
			return err
		}
		if err := s.passwords(here, src, []string{ep.Password}); err == nil {
			return errors.New("the old password is still taken")
		}
	case scenario.ServiceStopped:
		s.cmd.Process.Kill() // the first process of its namespace: sessions end with it
		s.cmd.Wait()
	}
	return nil
}

// read returns what sshd has logged since the last time.
func (s *sshd) read() ([]byte, error) {
	var out []byte
	buf := make([]byte, 32<<10)
	for {
		n, err := unix.Read(s.log, buf)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN), n == 0:
			return out, nil
		case err != nil:
			return out, fmt.Errorf("read log of sshd: %w", err)
		}
		out = append(out, buf[:n]...)
	}
}

var failedPassword = regexp.MustCompile(`^Failed password for (?:invalid user )?\S{1,64} from (\S{1,40}) port (\d{1,5}) ssh2`)

// denied waits until nobody is being served and returns from where wrong
// passwords came since the last time, one for each.
func (s *sshd) denied() ([]netip.AddrPort, error) {
	pid := strconv.Itoa(s.cmd.Process.Pid)
	for end := time.Now().Add(toolTimeout); time.Now().Before(end); time.Sleep(time.Millisecond) {
		children, err := os.ReadFile(filepath.Join("/proc", pid, "task", pid, "children"))
		if err != nil || len(bytes.TrimSpace(children)) == 0 {
			break // stopped, or at rest
		}
	}
	more, err := s.read()
	if err != nil {
		return nil, err
	}
	s.text = append(s.text, more...)
	var out []netip.AddrPort
	for {
		line, rest, whole := bytes.Cut(s.text, []byte("\n"))
		if !whole {
			return out, nil
		}
		s.text = rest
		if m := failedPassword.FindSubmatch(line); m != nil {
			if at, err := netip.ParseAddrPort(net.JoinHostPort(string(m[1]), string(m[2]))); err == nil {
				out = append(out, at)
			}
		}
	}
}

// loginRole makes a root of its own and becomes sshd in it.
func loginRole() error {
	var j jail
	if err := json.NewDecoder(os.Stdin).Decode(&j); err != nil {
		return err
	}
	if err := pivot("/tmp"); err != nil {
		return err
	}
	for path, text := range j.Files {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return err
		}
	}
	for _, path := range []string{"/secret", "/etc/passwd", "/etc/group", "/etc/nsswitch.conf", "/etc/ssh/authorized_keys"} {
		if err := os.Chmod(path, 0o644); err != nil {
			return err
		}
	}
	for i, path := range []string{"/etc/shadow", "/etc/shadow.rotated"} {
		hash, err := exec.Command(perlPath, "-e", `print crypt($ARGV[0], '$5$rounds=1000$'.$ARGV[1])`, j.Passwords[i], fmt.Sprintf("salt%d", i)).Output()
		if err != nil {
			return fmt.Errorf("hash password: %w", err)
		}
		if !bytes.HasPrefix(hash, []byte("$5$")) {
			return fmt.Errorf("hash password: got %.40q", hash)
		}
		if err := os.WriteFile(path, fmt.Appendf(nil, "root:*:19000:0:99999:7:::\nsshd:*:19000:0:99999:7:::\n%s:%s:19000:0:99999:7:::\n", scenario.Account, hash), 0o600); err != nil {
			return err
		}
	}
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	for _, fd := range []int{0, 1} {
		if err := unix.Dup3(int(null.Fd()), fd, 0); err != nil {
			return err
		}
	}
	runtime.LockOSThread() // what follows belongs to the thread that becomes sshd
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	return fmt.Errorf("become sshd: %w", unix.Exec(sshdPath, []string{sshdPath, "-D", "-e"}, []string{"PATH=/usr/bin"}))
}

// pivot makes a tmpfs with the system's programs the only thing that this
// process and its children can see.
func pivot(at string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", at, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "size=1m,mode=755"); err != nil {
		return fmt.Errorf("mount root: %w", err)
	}
	for _, dir := range []string{"usr", "etc/ssh", "dev", "run/sshd"} {
		if err := os.MkdirAll(filepath.Join(at, dir), 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount("/usr", filepath.Join(at, "usr"), "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("bind /usr: %w", err)
	}
	for _, link := range []string{"bin", "sbin", "lib", "lib64"} { // a merged /usr, which Debian 12 has
		if err := os.Symlink("usr/"+link, filepath.Join(at, link)); err != nil {
			return err
		}
	}
	for _, dev := range []string{"dev/null", "dev/zero", "dev/random", "dev/urandom"} {
		if err := os.WriteFile(filepath.Join(at, dev), nil, 0o600); err != nil {
			return err
		}
		if err := unix.Mount("/"+dev, filepath.Join(at, dev), "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind %s: %w", dev, err)
		}
	}
	if err := os.Chdir(at); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("change root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave old root: %w", err)
	}
	return os.Chdir("/")
}
