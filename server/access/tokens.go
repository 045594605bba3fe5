package access

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"trainerd/internal/fault"
)

// tokenFile is what a token file holds. Revoked tokens stay, for the audit log's reader.
type tokenFile struct {
	Version int     `json:"version"` // 1
	Tokens  []Token `json:"tokens"`
}

const (
	tokenFileVersion = 1
	maxTokenFile     = 16 << 20
)

// Tokens are the tokens of a file. A change of the file counts from the next
// request on. While the file cannot be read nobody is let in: an older copy may
// hold what was revoked since.
type Tokens struct {
	path string

	mu   sync.Mutex
	seen os.FileInfo // of the file that byID was read from; nil: none
	byID map[string]Token
	err  error // of the last reading
}

// OpenTokens reads a token file. It must exist and be good.
func OpenTokens(path string) (*Tokens, error) {
	t := &Tokens{path: path}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t, t.refresh()
}

// refresh reads the file again if it is another one than before. Writers replace
// the file, so a change always shows in inode, size or time. Called with mu held.
func (t *Tokens) refresh() error {
	st, err := os.Stat(t.path)
	if err != nil {
		t.seen, t.byID, t.err = nil, nil, fmt.Errorf("read tokens: %w", err)
		return t.err
	}
	if t.seen != nil && os.SameFile(st, t.seen) && st.Size() == t.seen.Size() && st.ModTime().Equal(t.seen.ModTime()) {
		return t.err
	}
	t.seen, t.byID = st, nil
	var f tokenFile
	if f, t.err = readTokens(t.path); t.err != nil {
		return t.err
	}
	t.byID = make(map[string]Token, len(f.Tokens))
	for _, tok := range f.Tokens {
		t.byID[tok.ID] = tok
	}
	return nil
}

func readTokens(path string) (tokenFile, error) {
	f, err := os.Open(path)
	if err != nil {
		return tokenFile{}, fmt.Errorf("read tokens: %w", err)
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxTokenFile+1))
	if err != nil {
		return tokenFile{}, fmt.Errorf("read tokens: %w", err)
	}
	if len(raw) > maxTokenFile {
		return tokenFile{}, fmt.Errorf("read tokens: %s has more than %d bytes", path, maxTokenFile)
	}
	doc, err := decodeTokens(raw)
	if err != nil {
		return doc, fmt.Errorf("read tokens: %s: %w", path, err)
	}
	return doc, nil
}

// decodeTokens reads a token file strictly: what is misspelt must not widen a token.
func decodeTokens(raw []byte) (tokenFile, error) {
	var f tokenFile
	d := json.NewDecoder(bytes.NewReader(raw))
	d.DisallowUnknownFields()
	if err := d.Decode(&f); err != nil {
		return f, err
	}
	if _, err := d.Token(); err != io.EOF {
		return f, errors.New("text after the document")
	}
	if f.Version != tokenFileVersion {
		return f, fmt.Errorf("version %d, expected %d", f.Version, tokenFileVersion)
	}
	ids := map[string]bool{}
	for i, t := range f.Tokens {
		switch {
		case len(t.ID) != 2*idBytes || strings.Trim(t.ID, "0123456789abcdef") != "":
			return f, fmt.Errorf("tokens[%d].id: expected %d hexadecimal digits", i, 2*idBytes)
		case ids[t.ID]:
			return f, fmt.Errorf("tokens[%d].id: %s is there twice", i, t.ID)
		case len(t.SHA256) != 64 || strings.Trim(t.SHA256, "0123456789abcdef") != "":
			return f, fmt.Errorf("tokens[%d].sha256: expected 64 hexadecimal digits", i)
		case len(t.Roles) == 0:
			return f, fmt.Errorf("tokens[%d].roles: expected at least one", i)
		}
		for _, r := range t.Roles {
			if !slices.Contains(Roles, r) {
				return f, fmt.Errorf("tokens[%d].roles: %q, expected submit, read or admin", i, r)
			}
		}
		ids[t.ID] = true
	}
	return f, nil
}

// dummy takes the place of a token that is not there, so that an unknown id
// costs what a wrong secret costs.
var dummy, _ = mint()

// find returns the living token of a text. known is the token that the text
// proves or, with a wrong secret, names; why says what is wrong, for the audit
// log alone. err is a file that cannot be read.
func (t *Tokens) find(text string, now time.Time) (tok Token, why string, err error) {
	t.mu.Lock()
	err = t.refresh()
	byID := t.byID
	t.mu.Unlock()
	if err != nil {
		return Token{}, "tokens unavailable", err
	}
	id, secret, wellFormed := parse(text)
	tok, known := byID[id]
	if !known {
		tok = dummy
	}
	holds := tok.holds(secret)
	alive, dead := tok.alive(now)
	switch {
	case text == "":
		return Token{}, "no token", nil
	case !wellFormed:
		return Token{}, "not a token", nil
	case !known:
		return Token{}, "unknown id", nil
	case !holds:
		return tok, "wrong secret", nil
	case !alive:
		return tok, dead, nil
	}
	return tok, "", nil
}

// Grant is what a new token is to be good for.
type Grant struct {
	Roles   []Role
	Job     string
	Note    string
	Expires time.Time // zero: never
}

// CreateToken adds a token to a file, which is made if it is not there, and
// returns its text, which is kept nowhere.
func CreateToken(path string, g Grant) (Token, string, error) {
	if len(g.Roles) == 0 {
		return Token{}, "", fault.BadField("role", "none", "submit, read or admin")
	}
	if !g.Expires.IsZero() && !g.Expires.After(time.Now()) {
		return Token{}, "", fault.BadField("expires", g.Expires.Format(time.RFC3339), "a time to come")
	}
	t, text := mint()
	t.Roles, t.Job, t.Note = g.Roles, g.Job, g.Note
	t.Created = time.Now().UTC().Truncate(time.Second)
	if !g.Expires.IsZero() {
		t.Expires = g.Expires.UTC().Truncate(time.Second)
	}
	err := changeTokens(path, func(f *tokenFile) error {
		f.Tokens = append(f.Tokens, t)
		return nil
	})
	return t, text, err
}

// RevokeToken ends a token. To revoke it again changes nothing.
func RevokeToken(path, id string) (Token, error) {
	var out Token
	err := changeTokens(path, func(f *tokenFile) error {
		i := slices.IndexFunc(f.Tokens, func(t Token) bool { return t.ID == id })
		if i < 0 {
			return fault.New(fault.NotFound, "token_not_found", "no token has the id %q", id)
		}
		if f.Tokens[i].Revoked.IsZero() {
			f.Tokens[i].Revoked = time.Now().UTC().Truncate(time.Second)
		}
		out = f.Tokens[i]
		return nil
	})
	return out, err
}

// ListTokens returns the tokens of a file, oldest first.
func ListTokens(path string) ([]Token, error) {
	f, err := readTokens(path)
	return f.Tokens, err
}

// changeTokens replaces the file by a changed one. Two at once wait for each other.
func changeTokens(path string, change func(*tokenFile) error) (err error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o750); err != nil {
		return fmt.Errorf("make the folder of the tokens: %w", err)
	}
	lock, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("lock tokens: %w", err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return fmt.Errorf("lock tokens: %w", err)
	}
	f, err := readTokens(path)
	if errors.Is(err, fs.ErrNotExist) {
		f, err = tokenFile{Version: tokenFileVersion}, nil
	}
	if err != nil {
		return err
	}
	if err := change(&f); err != nil {
		return err
	}
	raw, err := json.MarshalIndent(f, "", " ")
	if err != nil {
		return fmt.Errorf("encode tokens: %w", err)
	}
	tmp, err := os.CreateTemp(filepath.Dir(path), ".tokens-*") // mode 0600
	if err != nil {
		return fmt.Errorf("write tokens: %w", err)
	}
	defer os.Remove(tmp.Name()) // gone already when all went well
	_, err = tmp.Write(append(raw, '\n'))
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return fmt.Errorf("write tokens: %w", err)
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return fmt.Errorf("write tokens: %w", err)
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("write tokens: %w", err)
	}
	return errors.Join(dir.Sync(), dir.Close())
}
