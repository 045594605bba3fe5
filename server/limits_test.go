package server_test

import (
	"fmt"
	"net/http"
	"slices"
	"testing"
	"time"

	"trainerd/client"
	"trainerd/server/access"
	"trainerd/server/servertest"
)

// TestGuessingIsSlowedAndDoesNotFillTheLog: many wrong tokens from one address
// are told to wait, and a right one from there passes all the same.
func TestGuessingIsSlowedAndDoesNotFillTheLog(t *testing.T) {
	at := time.Unix(2e9, 0)
	g := guard(t, access.Options{Now: func() time.Time { return at }}, servertest.Options{})
	good := g.token(t, access.Grant{Roles: []access.Role{access.Read}})
	counts := map[int]int{}
	for i := range 150 {
		status, p := exchange(t, http.MethodGet, g.URL+"/v1/jobs", nil, map[string]string{"Authorization": fmt.Sprintf("Bearer trainerd_%016x_%064x", i, i)})
		if status == http.StatusTooManyRequests && (p.Code != "rate_limited" || p.retryAfter == "") {
			t.Fatalf("%+v", p)
		}
		counts[status]++
	}
	if counts[http.StatusUnauthorized] != 100 || counts[http.StatusTooManyRequests] != 50 {
		t.Errorf("answers: %v", counts)
	}
	if status, _ := exchange(t, http.MethodGet, g.URL+"/v1/jobs", nil, map[string]string{"Authorization": "Bearer " + good}); status != http.StatusOK {
		t.Errorf("the right token: %d", status)
	}
	if n := len(g.entries(t)); n != 101 {
		t.Errorf("%d audit entries, expected 101", n)
	}
}

func TestRateOfOneToken(t *testing.T) {
	at := time.Unix(2e9, 0)
	g := guard(t, access.Options{Rate: 2, Now: func() time.Time { return at }}, servertest.Options{Wrap: described(t)})
	a, b := g.token(t, access.Grant{Roles: []access.Role{access.Read}}), g.token(t, access.Grant{Roles: []access.Role{access.Read}})
	get := func(token string) (int, problem) {
		return exchange(t, http.MethodGet, g.URL+"/v1/jobs", nil, map[string]string{"Authorization": "Bearer " + token})
	}
	for range 4 {
		if status, _ := get(a); status != http.StatusOK {
			t.Fatalf("within the burst: %d", status)
		}
	}
	if status, p := get(a); status != http.StatusTooManyRequests || p.Code != "rate_limited" || p.retryAfter != "1" {
		t.Errorf("over it: %d %+v", status, p)
	}
	if status, _ := get(b); status != http.StatusOK {
		t.Errorf("another token: %d", status)
	}
	at = at.Add(500 * time.Millisecond)
	if status, _ := get(a); status != http.StatusOK {
		t.Errorf("after half a second: %d", status)
	}
}

// TestOneTokenLeavesPlaces: the streams of one token do not keep another out.
func TestOneTokenLeavesPlaces(t *testing.T) {
	g := guard(t, access.Options{Requests: 4, TokenRequests: 3}, servertest.Options{})
	greedy, modest := g.token(t, access.Grant{Roles: access.Roles}), g.token(t, access.Grant{Roles: []access.Role{access.Read}})
	c, err := client.New(g.URL, client.Options{Token: greedy, Retries: -1})
	if err != nil {
		t.Fatal(err)
	}
	j := create(t, c, t.Context(), g.JobDocument(2, nil))
	for range 3 {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, g.URL+"/v1/jobs/"+j.ID+"/events", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+greedy)
		stream, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer stream.Body.Close()
	}
	status, p := exchange(t, http.MethodGet, g.URL+"/v1/jobs", nil, map[string]string{"Authorization": "Bearer " + greedy})
	if status != http.StatusTooManyRequests || p.Code != "too_many_requests" || p.retryAfter != "1" {
		t.Errorf("a fourth of the token: %d %+v", status, p)
	}
	if status, p := exchange(t, http.MethodGet, g.URL+"/v1/jobs", nil, map[string]string{"Authorization": "Bearer " + modest}); status != http.StatusOK {
		t.Errorf("another token: %d %+v", status, p)
	}
	if !slices.ContainsFunc(g.entries(t), func(e access.Entry) bool { return e.Refused == "too many requests of the token at once" }) {
		t.Error("the audit log does not say which limit it was")
	}
}

// TestRequestsAtOnce: a stream takes a place until it ends; a probe needs none.
func TestRequestsAtOnce(t *testing.T) {
	g := guard(t, access.Options{Requests: 1}, servertest.Options{})
	admin := g.token(t, access.Grant{Roles: access.Roles})
	c, err := client.New(g.URL, client.Options{Token: admin, Retries: -1})
	if err != nil {
		t.Fatal(err)
	}
	j, err := c.CreateJob(t.Context(), g.JobDocument(2, nil), "")
	if err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, g.URL+"/v1/jobs/"+j.ID+"/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+admin)
	stream, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Jobs(t.Context()); client.Code(err) != "too_many_requests" {
		t.Errorf("beside a stream: %v", err)
	}
	if status, _ := exchange(t, http.MethodGet, g.URL+"/healthz", nil, nil); status != http.StatusOK {
		t.Errorf("a probe: %d", status)
	}
	stream.Body.Close()
	for until := time.Now().Add(5 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, err := c.Jobs(t.Context()); err == nil {
			break
		} else if time.Now().After(until) {
			t.Fatalf("the place of a stream that ended is not free: %v", err)
		}
	}
}
