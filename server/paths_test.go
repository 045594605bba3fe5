package server_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"trainerd/client"
	"trainerd/server/access"
	"trainerd/server/servertest"
)

// TestPathTricks: names in paths reach nothing that the plain names do not, and
// a token that is bound to a job stays with it.
func TestPathTricks(t *testing.T) {
	g := guard(t, access.Options{}, servertest.Options{})
	admin := g.token(t, access.Grant{Roles: access.Roles})
	c, err := client.New(g.URL, client.Options{Token: admin})
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	own, other := create(t, c, ctx, g.JobDocument(2, nil)), create(t, c, ctx, g.JobDocument(2, nil))
	for _, id := range []string{own.ID, other.ID} {
		await(t, c, ctx, id, "loaded", func(j client.Job) bool { return j.State != "loading" })
		if _, err := c.Publish(ctx, id, false); err != nil {
			t.Fatal(err)
		}
	}
	bound := g.token(t, access.Grant{Roles: access.Roles, Job: own.ID})
	// raw sends a path as it is, which a Go client would clean.
	raw := func(path, token string) (int, string) {
		conn, err := net.Dial("tcp", strings.TrimPrefix(g.URL, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer %s\r\n\r\n", path, token)
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatalf("%q: %v", path, err)
		}
		defer res.Body.Close()
		body, _ := io.ReadAll(res.Body)
		return res.StatusCode, string(body)
	}
	if status, _ := raw("/v1/jobs/"+own.ID+"/checkpoints/0/files/hf/config.json", bound); status != http.StatusOK {
		t.Fatalf("the plain name: %d", status)
	}
	for _, trick := range []string{
		"../", "..%2f", "..%2F", "%2e%2e/", "%2e%2e%2f", ".%2e/", "..\\", "..%5c", "..%255c", "..%252f", "....//", "%00", "%2500", "..%00/", "..;/", "/", "//", ".", "./", "%2f", "%c0%ae%c0%ae/", "%u002e/",
	} {
		for _, path := range []string{
			"/v1/jobs/" + own.ID + "/" + trick + other.ID,
			"/v1/jobs/" + own.ID + trick + other.ID,
			"/v1/jobs/" + trick + other.ID,
			"/v1/jobs/" + other.ID + trick,
			"/v1/" + trick + "jobs/" + other.ID,
			"/v1/jobs/" + own.ID + "/checkpoints/0/files/" + trick + trick + trick + other.ID + "/config.json",
			"/v1/jobs/" + own.ID + "/checkpoints/0/files/hf/" + trick + trick + "manifest.json",
			"/v1/jobs/" + own.ID + "/checkpoints/" + trick + "/files/hf/config.json",
			"/v1/jobs/" + own.ID + "/" + trick + trick + trick + "metrics",
			"/" + trick + "metrics",
		} {
			status, body := raw(path, bound)
			if status < 400 || status >= 500 {
				t.Errorf("%q by a token of %s: %d\n%.200s", path, own.ID, status, body)
			}
		}
		// What an unbound token may do is no more either: files come from the manifest alone.
		for _, name := range []string{trick + trick + trick + "etc/passwd", "hf/" + trick + "manifest.json"} {
			if status, body := raw("/v1/jobs/"+own.ID+"/checkpoints/0/files/"+name, admin); status < 400 || status >= 500 {
				t.Errorf("file %q: %d\n%.200s", name, status, body)
			}
		}
	}
}
