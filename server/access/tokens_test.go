package access

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"trainerd/internal/fault"
)

func create(t *testing.T, path string, g Grant) (Token, string) {
	t.Helper()
	tok, text, err := CreateToken(path, g)
	if err != nil {
		t.Fatal(err)
	}
	return tok, text
}

func TestTokenIsKeptWithoutItsSecret(t *testing.T) {
	path := filepath.Join(t.TempDir(), "sub", "tokens.json")
	tok, text := create(t, path, Grant{Roles: []Role{Read}, Job: "job-1", Note: "node"})
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	_, secret, _ := strings.Cut(strings.TrimPrefix(text, tokenPrefix), "_")
	if len(secret) != 2*secretBytes || bytes.Contains(raw, []byte(secret)) {
		t.Errorf("secret of %d digits, in the file: %v", len(secret), bytes.Contains(raw, []byte(secret)))
	}
	if len(text) <= 64 {
		t.Errorf("a token of %d bytes passes for a request id", len(text))
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	tokens, err := OpenTokens(path)
	if err != nil {
		t.Fatal(err)
	}
	got, why, err := tokens.find(text, time.Now())
	if err != nil || why != "" || got.ID != tok.ID || got.Job != "job-1" {
		t.Errorf("find: %+v, %q, %v", got, why, err)
	}
}

func TestWhyATokenIsNone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens.json")
	a, good := create(t, path, Grant{Roles: []Role{Admin}})
	b, other := create(t, path, Grant{Roles: []Role{Admin}})
	_, ends := create(t, path, Grant{Roles: []Role{Read}, Expires: time.Now().Add(time.Hour)})
	c, ended := create(t, path, Grant{Roles: []Role{Read}})
	if _, err := RevokeToken(path, c.ID); err != nil {
		t.Fatal(err)
	}
	tokens, err := OpenTokens(path)
	if err != nil {
		t.Fatal(err)
	}
	swapped := tokenPrefix + a.ID + strings.TrimPrefix(other, tokenPrefix+b.ID)
	last := good[:len(good)-1] + map[bool]string{true: "1", false: "0"}[strings.HasSuffix(good, "0")]
	now := time.Now()
	for _, tc := range []struct {
		name, text, why string
		at              time.Time
	}{
		{"good", good, "", now},
		{"good before it ends", ends, "", now},
		{"none", "", "no token", now},
		{"ended", ends, "expired", now.Add(time.Hour)},
		{"revoked", ended, "revoked", now},
		{"one digit off", last, "wrong secret", now},
		{"another's secret", swapped, "wrong secret", now},
		{"nobody's id", tokenPrefix + "0000000000000000" + strings.TrimPrefix(good, tokenPrefix+a.ID), "unknown id", now},
		{"only the id", tokenPrefix + a.ID + "_", "not a token", now},
		{"too short", good[:len(good)-2], "not a token", now},
		{"too long", good + "00", "not a token", now},
		{"the hash instead", tokenPrefix + a.ID + "_" + a.SHA256, "wrong secret", now},
		{"no prefix", strings.TrimPrefix(good, tokenPrefix), "not a token", now},
		{"NUL", good + "\x00", "not a token", now},
	} {
		if _, why, err := tokens.find(tc.text, tc.at); why != tc.why || err != nil {
			t.Errorf("%s: %q, %v, expected %q", tc.name, why, err, tc.why)
		}
	}
	// An empty hash in memory is nobody's.
	if (Token{}).holds([secretBytes]byte{}) {
		t.Error("a token without a hash holds a secret")
	}
}

func TestChangesOfTheFileCountAtOnce(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens.json")
	if _, err := OpenTokens(path); err == nil {
		t.Error("a file that is not there was opened")
	}
	first, text := create(t, path, Grant{Roles: []Role{Read}})
	tokens, err := OpenTokens(path)
	if err != nil {
		t.Fatal(err)
	}
	_, later := create(t, path, Grant{Roles: []Role{Read}})
	if _, why, err := tokens.find(later, time.Now()); why != "" || err != nil {
		t.Errorf("a new token: %q, %v", why, err)
	}
	if _, err := RevokeToken(path, first.ID); err != nil {
		t.Fatal(err)
	}
	if _, why, _ := tokens.find(text, time.Now()); why != "revoked" {
		t.Errorf("a revoked token: %q", why)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	// A file that is broken or gone lets nobody in, and a mended one is taken.
	if err := os.WriteFile(path, whole[:len(whole)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, _, err := tokens.find(later, time.Now()); err == nil {
			t.Error("let in with a broken file")
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, _, err := tokens.find(later, time.Now()); err == nil {
		t.Error("let in without a file")
	}
	if err := os.WriteFile(path, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, why, err := tokens.find(later, time.Now()); why != "" || err != nil {
		t.Errorf("with a mended file: %q, %v", why, err)
	}
}

func TestWritersOfTheFileDoNotLoseEachOther(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens.json")
	const n = 16
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			if _, _, err := CreateToken(path, Grant{Roles: []Role{Read}}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if list, err := ListTokens(path); err != nil || len(list) != n {
		t.Errorf("%d tokens, %v, expected %d", len(list), err, n)
	}
}

func TestGrantsAndRevocationsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "tokens.json")
	if _, _, err := CreateToken(path, Grant{}); fault.KindOf(err) != fault.Invalid {
		t.Errorf("without a role: %v", err)
	}
	if _, _, err := CreateToken(path, Grant{Roles: []Role{Read}, Expires: time.Now()}); fault.KindOf(err) != fault.Invalid {
		t.Errorf("ended before it began: %v", err)
	}
	create(t, path, Grant{Roles: []Role{Read}})
	if _, err := RevokeToken(path, "0123"); fault.KindOf(err) != fault.NotFound {
		t.Errorf("revoke nobody: %v", err)
	}
	for _, text := range []string{"", "root", "read,", "READ"} {
		if r, err := ParseRoles(text); err == nil {
			t.Errorf("roles %q: %v", text, r)
		}
	}
	if r, err := ParseRoles("submit, read,submit"); err != nil || len(r) != 2 {
		t.Errorf("roles: %v, %v", r, err)
	}
}

const hash = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"

func TestTokenFileIsReadStrictly(t *testing.T) {
	one := `{"id":"0123456789abcdef","sha256":"` + hash + `","roles":["read"],"created":"2030-01-01T00:00:00Z"}`
	for name, tc := range map[string]struct {
		text string
		want string // of the error; "": none
	}{
		"good":           {`{"version":1,"tokens":[` + one + `]}`, ""},
		"no tokens":      {`{"version":1,"tokens":[]}`, ""},
		"empty":          {``, "EOF"},
		"version":        {`{"version":2,"tokens":[]}`, "version"},
		"misspelt":       {`{"version":1,"tokens":[` + strings.Replace(one, `"created"`, `"jobs"`, 1) + `]}`, "jobs"},
		"misspelt role":  {`{"version":1,"tokens":[` + strings.Replace(one, `"read"`, `"raed"`, 1) + `]}`, "raed"},
		"no role":        {`{"version":1,"tokens":[` + strings.Replace(one, `"read"`, ``, 1) + `]}`, "roles"},
		"twice":          {`{"version":1,"tokens":[` + one + `,` + one + `]}`, "twice"},
		"short hash":     {`{"version":1,"tokens":[` + strings.Replace(one, hash, hash[1:], 1) + `]}`, "sha256"},
		"id of no digit": {`{"version":1,"tokens":[` + strings.Replace(one, "0123456789abcdef\",\"sha", "xyz3456789abcdef\",\"sha", 1) + `]}`, "id"},
		"text after it":  {`{"version":1,"tokens":[]}{}`, "after"},
	} {
		_, err := decodeTokens([]byte(tc.text))
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, expected %q", name, err, tc.want)
		}
	}
}

// FuzzTokenFile: what is accepted can be written and read again as the same.
func FuzzTokenFile(f *testing.F) {
	f.Add([]byte(`{"version":1,"tokens":[{"id":"0123456789abcdef","sha256":"` + hash + `","roles":["read"],"job":"j","created":"2030-01-01T00:00:00Z","expires":"2031-01-01T00:00:00Z"}]}`))
	f.Add([]byte(`{"version":1}`))
	f.Fuzz(func(t *testing.T, raw []byte) {
		a, err := decodeTokens(raw)
		if err != nil {
			return
		}
		again, err := json.Marshal(a)
		if err != nil {
			return // a year that JSON has no form for
		}
		b, err := decodeTokens(again)
		if err != nil || len(a.Tokens) != len(b.Tokens) {
			t.Errorf("%s: %v", again, err)
		}
	})
}

// FuzzBearer: no text but the token's own is taken for it.
func FuzzBearer(f *testing.F) {
	path := filepath.Join(f.TempDir(), "tokens.json")
	_, text, err := CreateToken(path, Grant{Roles: []Role{Admin}})
	if err != nil {
		f.Fatal(err)
	}
	tokens, err := OpenTokens(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add("trainerd_0123456789abcdef_" + hash)
	f.Add("trainerd__")
	f.Add(text[:30])
	f.Fuzz(func(t *testing.T, s string) {
		if _, why, err := tokens.find(s, time.Now()); err != nil || why == "" && !strings.EqualFold(s, text) {
			t.Errorf("%q: %q, %v", s, why, err)
		}
	})
}
