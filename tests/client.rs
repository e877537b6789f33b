//! The client: what it sends, what it shows of an answer, and what it sends again.

use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};

use revproc::client::{Client, Error, Settings};
use revproc::protocol::{Code, Data, Id, Outgoing, hash};
use serde_json::{Value, json};

use crate::support::leased::{Answer, Leased};
use crate::support::peers::{Actor, Reserved, serve};
use crate::support::{
    BOUND, Program, binary, client, fixed_port, proxy, proxy_on, registered, run_client,
};

const VERIFIED: &str = "Hash of payload is correct";
const TEXT: [&str; 4] = ["-pp", "PP_1", "-text", "hello"];

/// What a fake proxy does with a message.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// Passes on the ack of a server.
    Ack,
    /// Refuses it with this code.
    Refuse(&'static str),
    /// Answers with this.
    Say(&'static str),
    /// Closes the connection.
    Close,
}

/// A proxy that takes these steps, one a message, and the last one for ever. The messages are received
/// as they come.
fn fake_proxy(steps: &'static [Step]) -> (Actor, u16, Receiver<Value>) {
    let listener = Reserved::any().listen();
    let port = listener.local_addr().unwrap().port();
    let (sender, messages) = channel();
    let count = AtomicUsize::new(0);
    let actor = serve(listener, move |stage, mut stream| {
        while let Some(message) = stage.recv(stream) {
            let step = steps[count.fetch_add(1, Ordering::SeqCst).min(steps.len() - 1)];
            let digest = hash(message["payload"].as_str().unwrap());
            let answer = match step {
                Step::Ack => json!({"type": 2, "srcid": 1, "destid": 50, "payload": digest}),
                Step::Refuse(code) => {
                    json!({"type": 3, "srcid": 0, "destid": 50, "payload": "not \u{7}now", "code": code})
                }
                Step::Say(_) | Step::Close => Value::Null,
            };
            // Before the answer, which may be the end of the test. Not every test looks at them.
            let _ = sender.send(message);
            match step {
                Step::Close => return,
                Step::Say(words) => stream.write_all(words.as_bytes()).unwrap(),
                _ => stream.write_all(answer.to_string().as_bytes()).unwrap(),
            }
        }
    });
    (actor, port, messages)
}

/// Runs a client to its end, whose standard output is bytes.
fn bytes_of_client(proxy: u16, arguments: &[&str]) -> Output {
    let mut command = Command::new(binary("client"));
    command.args(["-id", "50", "-revproc", &proxy.to_string(), "-result"]).args(arguments);
    command.stdin(Stdio::null()).output().unwrap()
}

fn lines(bytes: &[u8]) -> Vec<&str> {
    std::str::from_utf8(bytes).unwrap().lines().collect()
}

#[test]
fn a_policy_and_a_text_take_the_place_of_a_packet_file() {
    let proxy = proxy(&[]);
    let _server = registered("1", "PP_1", &proxy, &[]);
    let (status, out, err) = run_client(proxy.1, &TEXT, "");
    assert_eq!(status.code(), Some(0));
    let (_, expected, _) = client(proxy.1, &["packets/hello.json"], &[]);
    assert_eq!(out, expected);
    assert_eq!((out.len(), err.len()), (3, 0), "{err:#?}");
}

#[test]
fn a_text_is_sent_as_it_is_however_it_begins() {
    let (_proxy, port, messages) = fake_proxy(&[Step::Ack]);
    let send = |arguments: &[&str], input: &str| {
        let (status, _, err) = run_client(port, &[&["-pp", "-PP"], arguments].concat(), input);
        assert_eq!(status.code(), Some(0), "{arguments:?}: {err:#?}");
        messages.recv_timeout(BOUND).unwrap()
    };
    for text in ["", "-port", "--", "--text", "-5", "Grüße\n"] {
        let expected = json!({"type": 0, "srcid": 50, "privPoliId": "-PP", "payloadsize": text.len(),
            "payload": text});
        assert_eq!(send(&["-text", text], ""), expected);
        assert_eq!(send(&["-text", "-"], text), expected, "from standard input");
    }
}

#[test]
fn a_text_on_standard_input_that_is_none_or_too_long_is_told_and_nothing_is_sent() {
    let nobody = Reserved::any();
    for (input, arguments, says) in [
        (
            b"one\ntwo \xff".to_vec(),
            ["-max-packet", "256"],
            "client: standard input: line 2, column 5: not UTF-8, as a message's text must be; encode it, \
             for example as base64",
        ),
        (
            b"x".repeat(257),
            ["-max-packet", "256"],
            "client: standard input has more than 256 bytes, the longest packet (-max-packet)",
        ),
    ] {
        let port = nobody.port.to_string();
        let mut child = Command::new(binary("client"))
            .args(["-id", "50", "-revproc", &port, "-pp", "PP_1", "-text", "-"])
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(&input).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(lines(&output.stderr), [says]);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0));
    }
}

#[test]
fn the_time_the_number_and_once_go_into_the_packet_of_a_text_and_of_a_file() {
    let (_proxy, port, messages) = fake_proxy(&[Step::Ack]);
    let options = ["-timeout", "2m", "-once", "-msgid", "-m1"];
    let file =
        json!({"type": 0, "privPoliId": "PP_1", "payload": "hello", "timeout": 3, "msgid": "f"});
    for (arguments, input) in [(TEXT.as_slice(), ""), (&["-pkt", "-"], &*file.to_string())] {
        let (status, ..) = run_client(port, &[arguments, &options].concat(), input);
        assert_eq!(status.code(), Some(0));
        let message = messages.recv_timeout(BOUND).unwrap();
        let sent = [&message["timeout"], &message["once"], &message["msgid"], &message["payload"]];
        assert_eq!(sent, [&json!(120), &json!(true), &json!("-m1"), &json!("hello")]);
    }
    run_client(port, &["-pkt", "-"], &file.to_string());
    let message = messages.recv_timeout(BOUND).unwrap();
    assert_eq!(
        (&message["timeout"], &message["msgid"]),
        (&json!(3), &json!("f")),
        "the file's own"
    );
    assert_eq!(message.get("once"), None);
}

#[test]
fn a_result_is_shown_between_the_ack_and_the_verdict() {
    const LONG: &str = concat!(
        r#""result":""#,
        "0123456789012345678901234567890123456789012345678901234567890123456789",
        r#"""#
    );
    let proxy = proxy(&[]);
    for (fields, shown) in [
        (r#""result":"HELLO""#, "Result: HELLO"),
        (r#""result":"""#, "Result: "),
        (r#""result":"two\nlines \u001b[2J""#, "Result: two\\nlines \\u{1b}[2J"),
        (
            LONG,
            "Result: 0123456789012345678901234567890123456789012345678901234567890123… (70 bytes)",
        ),
        (r#""result":"R3LDvMOfZQo=","encoding":"base64""#, "Result: Grüße\\n"),
        (r#""encoding":"base64","result":"/9j/4AA""#, "Result: (5 bytes)"),
    ] {
        let _server = Leased::start("1", "PP_1", proxy.1, move |_| Answer::AckWith(fields));
        let (status, out, err) = run_client(proxy.1, &TEXT, "");
        assert_eq!(status.code(), Some(0), "{err:#?}");
        assert_eq!((out.len(), err.len()), (4, 0), "{out:#?}");
        assert!(out[1].starts_with("Receiving a response from the server 1 payload: "), "{out:#?}");
        assert_eq!([&out[2], &out[3]], [shown, VERIFIED]);
        let (_, quiet, _) = run_client(proxy.1, &[&TEXT[..], &["-quiet"]].concat(), "");
        assert_eq!(quiet, [""; 0]);
    }
}

#[test]
fn with_result_standard_output_has_the_results_bytes_and_nothing_else() {
    let proxy = proxy(&[]);
    let _server = Leased::start("1", "PP_1", proxy.1, |taken| match taken.number % 3 {
        0 => Answer::AckWith(r#""result":"two\nlines\u0007""#),
        1 => Answer::AckWith(r#""result":"/wAKgA==","encoding":"base64""#),
        _ => Answer::AckWith(r#""result":"""#),
    });
    let output = bytes_of_client(
        proxy.1,
        &["-pkt"].iter().chain(&["packets/hello.json"; 3]).copied().collect::<Vec<_>>(),
    );
    assert_eq!(output.stdout, b"two\nlines\x07\xff\0\n\x80");
    assert_eq!(output.status.code(), Some(0));
    let err = lines(&output.stderr);
    assert_eq!(err.len(), 12, "{err:#?}");
    assert!(err[0].starts_with("Sending message hello to privacy policy PP_1 "), "{err:#?}");
    assert_eq!([err[2], err[3]], ["Result: two\\nlines\\u{7}", VERIFIED]);
    let quiet = bytes_of_client(proxy.1, &[&TEXT[..], &["-quiet"]].concat());
    assert_eq!((&*quiet.stdout, &*quiet.stderr), (&b"two\nlines\x07"[..], &b""[..]));
}

#[test]
fn with_result_an_answer_without_one_is_told_and_exits_with_1() {
    let proxy = proxy(&[]);
    let _server = registered("1", "PP_1", &proxy, &[]);
    for (arguments, last) in [
        (TEXT, "client: server 1 sent no result"),
        (
            ["-pp", "PP_9", "-text", "hello"],
            "Message not delivered: no server serves privacy policy \"PP_9\"",
        ),
    ] {
        let output = bytes_of_client(proxy.1, &arguments);
        assert!(lines(&output.stderr).contains(&last), "{output:?}");
        assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0));
    }
}

#[test]
fn with_result_nothing_is_written_of_an_answer_to_another_text() {
    let ack = r#"{"type":2,"srcid":1,"destid":50,"payload":"00","result":"for another text"}"#;
    let (_proxy, port, _) = fake_proxy(Box::leak(Box::new([Step::Say(ack)])));
    let output = bytes_of_client(port, &TEXT);
    assert_eq!(lines(&output.stderr).last(), Some(&"Hash of payload is not correct"));
    assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0));
}

#[test]
fn with_result_a_full_disk_is_told_and_exits_with_1() {
    let proxy = proxy(&[]);
    let _server = Leased::start("1", "PP_1", proxy.1, |_| Answer::AckWith(r#""result":"HELLO""#));
    let output = Command::new(binary("client"))
        .args(["-id", "50", "-result", "-revproc", &proxy.1.to_string()])
        .args(TEXT)
        .stdout(std::fs::File::options().write(true).open("/dev/full").unwrap())
        .stderr(Stdio::piped())
        .output()
        .unwrap();
    let last = "client: could not write to standard output: no space left on device";
    assert_eq!(lines(&output.stderr).last(), Some(&last));
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn a_result_that_cannot_be_read_is_told_and_the_hash_is_judged_all_the_same() {
    let proxy = proxy(&[]);
    for (fields, why) in [
        (r#""result":"a*b=","encoding":"base64""#, "it is no base64: invalid symbol 42, offset 1"),
        (
            r#""result":"x","encoding":"gz\u001b""#,
            "its encoding is \"gz\\u{1b}\", which is not known here; base64 is",
        ),
    ] {
        let _server = Leased::start("1", "PP_1", proxy.1, move |_| Answer::AckWith(fields));
        let (status, out, err) = run_client(proxy.1, &TEXT, "");
        assert_eq!(status.code(), Some(1));
        assert_eq!(out.last().unwrap(), VERIFIED);
        assert_eq!(err, [format!("client: the result of server 1 cannot be read: {why}")]);
        let output = bytes_of_client(proxy.1, &TEXT);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0));
    }
}

#[test]
fn a_once_message_that_a_server_took_is_told_and_not_repeated() {
    let proxy = proxy(&[]);
    let server = Leased::start("3", "PP_1", proxy.1, |_| Answer::CloseAtOnce);
    let (status, out, err) =
        run_client(proxy.1, &[&TEXT[..], &["-once", "-wait", "20"]].concat(), "");
    assert_eq!(status.code(), Some(1));
    let expected = format!(
        "Message not delivered: it may have been carried out: server 3 (127.0.0.1:{}) \
         closed the connection without an ack",
        server.port
    );
    assert_eq!((out.last(), err.len()), (Some(&expected), 0), "{err:#?}");
    assert_eq!(server.taken().len(), 1);
}

#[test]
fn work_that_failed_is_told_with_its_reason_and_not_repeated() {
    let proxy = proxy(&[]);
    let server = Leased::start("1", "PP_1", proxy.1, |_| Answer::Refuse("failed"));
    let (status, out, err) = run_client(proxy.1, &[&TEXT[..], &["-wait", "20"]].concat(), "");
    assert_eq!((status.code(), err.len()), (Some(1), 0), "{err:#?}");
    assert_eq!(out.last().unwrap(), "Message not delivered: not today");
    assert_eq!(server.taken().len(), 1);
}

/// A first answer, and whether a client that waits sends the message again after it, and one that is to
/// be carried out once.
const REPEATED: [(&[Step], bool, bool); 10] = [
    (&[Step::Refuse("no-server"), Step::Ack], true, true),
    (&[Step::Refuse("unreachable"), Step::Ack], true, true),
    (&[Step::Refuse("overloaded"), Step::Ack], true, true),
    (&[Step::Refuse("timeout"), Step::Ack], true, false),
    (&[Step::Close, Step::Ack], true, false),
    (&[Step::Say(r#"{"Error": "not now"}"#), Step::Ack], true, false),
    (&[Step::Refuse("outcome-unknown"), Step::Ack], false, false),
    (&[Step::Refuse("bad-ack"), Step::Ack], false, false),
    (&[Step::Refuse("of another proxy"), Step::Ack], false, false),
    (&[Step::Say("{}"), Step::Ack], true, false),
];

#[test]
fn a_client_that_waits_repeats_a_once_message_only_where_nobody_has_carried_it_out() {
    for (steps, usual, once) in REPEATED {
        for (option, is_repeated) in [(&[] as &[_], usual), (&["-once"], once)] {
            let (_proxy, port, messages) = fake_proxy(steps);
            let arguments = [&TEXT[..], &["-wait", "20"], option].concat();
            let (status, out, err) = run_client(port, &arguments, "");
            let expected = if is_repeated { (Some(0), 2) } else { (Some(1), 1) };
            let sent = messages.try_iter().count();
            assert_eq!((status.code(), sent), expected, "{steps:?} {option:?}: {out:#?} {err:#?}");
        }
    }
}

#[test]
fn a_once_message_waits_for_a_proxy_that_cannot_be_reached() {
    let reserved = Reserved::any();
    let port = reserved.port.to_string();
    let arguments = ["-id", "50", "-revproc", &port, "-once", "-wait", "20"];
    let mut waiting = Program::start("client", &[&arguments, &TEXT[..]].concat());
    waiting.warning("connection refused (is revproc running there?); trying again");
    let proxy = (Program::start("revproc", &["-port", &port]), reserved.port);
    let _server = registered("1", "PP_1", &proxy, &[]);
    assert_eq!(waiting.end().code(), Some(0), "{}", waiting.report());
}

#[test]
fn of_a_once_message_without_an_answer_it_is_told_that_it_may_have_been_carried_out() {
    let (_proxy, port, _) = fake_proxy(&[Step::Close]);
    let closed = format!(
        "Message not delivered: the reverse proxy at 127.0.0.1:{port} closed the connection without an answer"
    );
    for (option, more) in [(&[] as &[_], ""), (&["-once"], "; a server may have carried it out")] {
        let (_, out, _) = run_client(port, &[&TEXT[..], option].concat(), "");
        assert_eq!(out.last().unwrap(), &format!("{closed}{more}"));
    }
}

#[test]
fn a_time_beyond_all_clocks_is_sent_as_it_is() {
    let (_proxy, port, messages) = fake_proxy(&[Step::Ack]);
    for timeout in [u64::MAX, 9_999_999_999_999_999_999] {
        let file = json!({"type": 0, "privPoliId": "PP_1", "payload": "x", "timeout": timeout});
        let (status, out, err) = run_client(port, &["-pkt", "-"], &file.to_string());
        assert!(status.success(), "{out:#?}{err:#?}");
        assert_eq!(messages.recv_timeout(BOUND).unwrap()["timeout"], timeout);
    }
}

#[test]
fn what_a_stranger_answers_changes_no_terminal_wherever_the_error_is_shown() {
    const TWICE: &str = r#"{"type":2,"\u001b[2J":1,"\u001b[2J":2}"#;
    let (_stranger, port, _) = fake_proxy(&[Step::Say(TWICE)]);
    let proxy = port.to_string().parse().unwrap();
    let mut client = Client::new(Settings::new(Id::from_text("50"), vec![proxy]));
    let error = client.call("PP_1", "x").unwrap_err().to_string();
    assert!(error.contains(r"\u{1b}[2J"), "{error}");
    assert!(!error.contains('\u{1b}'), "{error}");
}

#[test]
fn a_client_waits_as_long_as_its_file_gives_the_message() {
    let silent = Reserved::any().listen();
    let port = silent.local_addr().unwrap().port();
    let file = json!({"type": 0, "privPoliId": "PP_1", "payload": "x", "timeout": "1"}).to_string();
    let (_, out, _) = run_client(port, &["-pkt", "-"], &file);
    assert!(out.last().unwrap().ends_with(" gave no answer within 6 s (-timeout)"), "{out:#?}");
}

#[test]
fn a_message_that_one_proxy_leaves_without_an_answer_goes_to_the_next_but_not_if_to_be_carried_out_once()
 {
    for (option, expected) in [(&[] as &[_], (Some(0), 1)), (&["-once"], (Some(1), 0))] {
        let (_closes, first, received) = fake_proxy(&[Step::Close]);
        let (_acks, second, messages) = fake_proxy(&[Step::Ack]);
        let second = second.to_string();
        let arguments = [&["-revproc", &second], &TEXT[..], option].concat();
        let (status, out, err) = run_client(first, &arguments, "");
        let closed = format!(
            "the reverse proxy at 127.0.0.1:{first} closed the connection without an answer"
        );
        assert_eq!((status.code(), messages.try_iter().count()), expected, "{out:#?} {err:#?}");
        assert_eq!(received.try_iter().count(), 1);
        if option.is_empty() {
            assert_eq!(err, [format!("client: {closed}; sending it to 127.0.0.1:{second}")]);
        } else {
            let end = format!("Message not delivered: {closed}; a server may have carried it out");
            assert_eq!((out.last(), err.len()), (Some(&end), 0), "{err:#?}");
        }
    }
}

#[test]
fn a_client_that_waits_begins_behind_a_proxy_that_is_silent() {
    let silent = Reserved::any().listen();
    let first = silent.local_addr().unwrap().port();
    let (_acks, second, messages) = fake_proxy(&[Step::Ack]);
    let second = second.to_string();
    let arguments = ["-revproc", &second, "-timeout", "1", "-wait", "20"];
    let (status, out, err) = run_client(first, &[&arguments, &TEXT[..]].concat(), "");
    let silence = format!("the reverse proxy at 127.0.0.1:{first} gave no answer within 6 s");
    assert_eq!(err, [format!("client: {silence} (-timeout); trying again")]);
    assert_eq!((status.code(), messages.try_iter().count()), (Some(0), 1), "{out:#?}");
}

#[test]
fn what_each_of_several_proxies_did_is_told() {
    let nobody = Reserved::any();
    let (_closes, port, _) = fake_proxy(&[Step::Close]);
    let behind = port.to_string();
    let arguments = [&["-revproc", &behind], &TEXT[..]].concat();
    let (status, out, _) = run_client(nobody.port, &arguments, "");
    let expected = format!(
        "Message not delivered: could not connect to the reverse proxy at 127.0.0.1:{}: connection \
         refused (is revproc running there?); the reverse proxy at 127.0.0.1:{port} closed the \
         connection without an answer",
        nobody.port
    );
    assert_eq!((status.code(), out.last()), (Some(1), Some(&expected)));
}

fn library_client(port: u16) -> Client {
    library_client_of(&[port])
}

fn library_client_of(ports: &[u16]) -> Client {
    let proxies = ports.iter().map(|port| port.to_string().parse().unwrap()).collect();
    Client::new(Settings::new(Id::from_text("50"), proxies))
}

#[test]
fn calls_keep_to_the_proxy_that_answers_and_leave_one_that_does_not() {
    let (_first, first, at_first) = fake_proxy(&[Step::Refuse("no-server"), Step::Close]);
    let (_second, second, at_second) = fake_proxy(&[Step::Ack]);
    let mut client = library_client_of(&[first, second]);
    let refused = client.call("PP_1", "one").unwrap_err();
    assert!(matches!(refused, Error::Refused { .. }), "{refused}");
    let closed = client.send(&once("two")).unwrap_err();
    assert!(matches!(closed, Error::Closed(_)), "{closed}");
    client.send(&once("three")).unwrap();
    client.call("PP_1", "four").unwrap();
    assert_eq!((at_first.try_iter().count(), at_second.try_iter().count()), (2, 2));
}

fn once(payload: &str) -> Outgoing {
    let message = Data::new(Id::from_text("50"), Id::from_text("PP_1"), payload);
    Outgoing::new(&Data { once: true, ..message })
}

#[test]
fn a_call_brings_the_servers_id_and_its_result() {
    let proxy = proxy(&[]);
    let _server = Leased::start("1", "PP_1", proxy.1, |taken| match taken.number {
        0 => Answer::Ack,
        1 => Answer::AckWith(r#""result":"text""#),
        _ => Answer::AckWith(r#""result":"/w==","encoding":"base64""#),
    });
    let mut client = library_client(proxy.1);
    for result in [None, Some(b"text".to_vec()), Some(vec![0xff])] {
        let reply = client.call("PP_1", "hello").unwrap();
        assert_eq!((&*reply.server, reply.result), ("1", result));
    }
}

#[test]
fn each_way_in_which_a_call_fails_has_its_error() {
    let wrong_hash = r#"{"type":2,"srcid":1,"destid":50,"payload":"00"}"#;
    let bad_result = concat!(
        r#"{"type":2,"srcid":1,"destid":50,"payload":"aaf4c61ddcc5e8a2dabede0f3b482cd9aea9434d","#,
        r#""result":"x","encoding":"gzip"}"#
    );
    let steps = [
        Step::Refuse("failed"),
        Step::Refuse("of another proxy"),
        Step::Say(r#"{"Error": "no"}"#),
        Step::Say(wrong_hash),
        Step::Say(bad_result),
        Step::Say(r#"{"type":0,"srcid":1,"privPoliId":"P","payload":"x"}"#),
        Step::Say("HTTP/1.1 400 Bad Request\r\n\r\n"),
        Step::Close,
    ];
    let (_proxy, port, messages) = fake_proxy(Box::leak(Box::new(steps)));
    let mut client = library_client(port);
    let errors = steps.map(|step| (step, client.call("PP_1", "hello").unwrap_err()));
    let server = "1".to_owned();
    let reason = "not \u{7}now".to_owned();
    assert_eq!(errors[0].1, Error::Refused { code: Some(Code::Failed), reason: reason.clone() });
    assert_eq!(errors[0].1.to_string(), "not \\u{7}now", "nothing that could change a terminal");
    assert_eq!(errors[1].1, Error::Refused { code: None, reason });
    assert_eq!(errors[2].1, Error::ForeignRefusal("no".to_owned()));
    assert_eq!(errors[3].1, Error::Altered { server: server.clone() });
    let reason = "its encoding is \"gzip\", which is not known here; base64 is".to_owned();
    assert_eq!(errors[4].1, Error::BadResult { server, reason });
    assert!(matches!(errors[5].1, Error::BadAnswer(_)), "{errors:#?}");
    assert!(matches!(errors[6].1, Error::BadAnswer(_)), "{errors:#?}");
    assert!(matches!(errors[7].1, Error::Closed(_)), "{errors:#?}");
    assert_eq!(messages.try_iter().count(), steps.len(), "none was sent twice");
    let error = library_client(Reserved::any().port).call("PP_1", "hello").unwrap_err();
    assert!(matches!(error, Error::Unreachable(_)), "{error:?}");
}

#[test]
fn a_call_on_a_kept_connection_that_is_closed_goes_on_a_fresh_one_but_not_if_to_be_carried_out_once()
 {
    const STEPS: &[Step] = &[Step::Ack, Step::Close, Step::Ack];
    let (_proxy, port, messages) = fake_proxy(STEPS);
    let mut client = library_client(port);
    for payload in ["one", "two"] {
        client.call("PP_1", payload).unwrap();
    }
    assert_eq!(messages.try_iter().count(), 3, "the second one twice");

    let (_proxy, port, messages) = fake_proxy(STEPS);
    let mut client = library_client(port);
    client.send(&once("one")).unwrap();
    let error = client.send(&once("two")).unwrap_err();
    assert!(matches!(error, Error::Closed(_)) && !error.may_repeat(true), "{error:?}");
    assert!(error.to_string().ends_with("; a server may have carried it out"), "{error}");
    assert_eq!(messages.try_iter().count(), 2);
    client.send(&once("three")).unwrap();
}

#[test]
fn a_once_message_does_not_go_on_a_kept_connection_that_was_closed_meanwhile() {
    let mut proxy = proxy_on(fixed_port(), &[]);
    let mut client = library_client(proxy.1);
    for payload in ["one", "two"] {
        let _server = registered("1", "PP_1", &proxy, &[]);
        client.send(&once(payload)).unwrap();
        proxy.0.kill();
        proxy = proxy_on(proxy.1, &[]);
    }
}
