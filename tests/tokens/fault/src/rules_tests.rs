use super::*;

fn rules(text: &str) -> Rules {
    Rules::parse(text, &Rules::default()).unwrap()
}

#[test]
fn good_lines() {
    let ms = Duration::from_millis;
    for (line, action) in [
        ("C_Encrypt return CKR_DEVICE_REMOVED after 100 times 5", Action::Return(0x32)),
        ("* return 0x30", Action::Return(0x30)),
        ("C_Decrypt return 0x80000201 token second", Action::Return(0x8000_0201)),
        ("  C_Decrypt   delay 5ms probability 0.1", Action::Delay(ms(5), ms(5))),
        ("C_Decrypt delay 5ms of results", Action::Delay(ms(5), ms(5))),
        ("C_Decrypt delay 300us..2s", Action::Delay(Duration::from_micros(300), ms(2000))),
        ("C_Finalize half-way CKR_DEVICE_ERROR times 1", Action::HalfWay(0x30)),
        ("C_Login hang", Action::Hang),
        ("C_Encrypt crash after 3", Action::Crash),
        ("C_EncryptInit lose-sessions times 1", Action::LoseSessions),
        ("C_Decrypt flip times 1", Action::Flip),
        ("C_GetSlotList empty", Action::Empty),
        ("C_OpenSession limit 6 token trousseau", Action::Limit(6)),
        ("C_Login lock-after 3", Action::LockAfter(3)),
        ("C_Encrypt pad 12 times 1", Action::Pad(12)),
        ("C_WrapKey truncate 8", Action::Truncate(8)),
        ("C_EncryptInit gcm written token second", Action::Gcm(Habit::Written, 0x1087)),
        ("C_EncryptInit gcm prepended by 0x80001087", Action::Gcm(Habit::Prepended, 0x8000_1087)),
        ("C_GenerateKey forbid 0x103", Action::Forbid(0x103)),
        ("C_GenerateKey drop 0x40000600", Action::Drop(0x4000_0600)),
        ("C_GetAttributeValue hide 0x163", Action::Hide(0x163)),
        ("C_GenerateKey say CKA_EXTRACTABLE=true", Action::Say(0x162, true)),
        ("C_GetAttributeValue say CKA_LOCAL=false", Action::Say(0x163, false)),
        ("C_GetTokenInfo say CKF_LOGIN_REQUIRED=false", Action::Flag(4, false)),
    ] {
        let parsed = rules(&format!("# a comment\n\nseed 7\n{line}\n"));
        assert_eq!(parsed.0.len(), 1, "{line}");
        assert_eq!(parsed.0[0].action, action, "{line}");
        assert_eq!(parsed.0[0].seed, 7);
    }
}

#[test]
fn bad_lines_are_named() {
    for (line, reason) in [
        ("C_Encrypt", "no action"),
        ("C_Encript hang", "no function"),
        ("C_Encrypt explode", "no action"),
        ("C_Encrypt return", "lacks"),
        ("C_Encrypt return CKR_NONSENSE", "CKR_NONSENSE"),
        ("C_Encrypt return 48", "48"),
        ("C_Encrypt return 0xzz", "0xzz"),
        ("C_Encrypt delay", "lacks"),
        ("C_Encrypt delay 5", "not a time"),
        ("C_Encrypt delay 5ms..1ms", "before it begins"),
        ("C_Encrypt hang after", "after"),
        ("C_Encrypt hang after x", "not a number"),
        ("C_Encrypt hang after -1", "not a number"),
        ("C_Encrypt hang sometimes 3", "sometimes"),
        ("C_Encrypt hang probability 2", "probability"),
        ("C_Login flip", "this is for one of"),
        ("* flip", "this is for one of"),
        ("C_Login hang of results", "this is for one of"),
        ("C_Encrypt flip of results", "of is no qualifier"),
        ("C_Login pad 3", "this is for one of"),
        ("C_Encrypt truncate", "lacks"),
        ("C_EncryptInit gcm ours", "no habit"),
        ("C_EncryptInit gcm written by 17", "not a number like"),
        ("C_Encrypt gcm written", "C_EncryptInit only"),
        ("C_GenerateKey forbid CKA_SENSITIVE", "not a number like"),
        ("C_GetAttributeValue hide 0x163 times 2", "times"),
        ("C_Encrypt empty", "C_GetSlotList only"),
        ("C_OpenSession limit 3 times 2", "times"),
        ("C_Login lock-after", "lacks"),
        ("C_Logout lock-after 3", "C_Login only"),
        ("C_Login say CKA_LOCAL=true", "say is for"),
        ("C_GenerateKey say CKA_LOCAL", "not CKA_"),
        ("C_GenerateKey say CKA_ID=true", "CKA_ID is no attribute"),
        ("C_GenerateKey say CKA_LOCAL=yes", "yes is not"),
        ("C_GetTokenInfo say CKA_LOCAL=true", "CKA_LOCAL is no flag"),
        ("seed x", "not a number"),
        ("seed", "no function"),
    ] {
        let (n, error) = Rules::parse(&format!("C_Login hang\n{line}"), &Rules::default()).unwrap_err();
        assert_eq!(n, 2, "{line}");
        assert!(error.contains(reason), "{line}: {error}");
    }
}

#[test]
fn a_rule_is_about_its_function_and_token() {
    for (line, function, token, is_about) in [
        ("C_Login hang", "C_Login", None, true),
        ("C_Login hang", "C_Logout", None, false),
        ("* hang", "C_Logout", Some("a"), true),
        ("* hang token a", "C_Logout", Some("a"), true),
        ("* hang token a", "C_Logout", Some("b"), false),
        ("* hang token a", "C_Initialize", None, false),
    ] {
        assert_eq!(rules(line).0[0].is_about(function, token), is_about, "{line}: {function} {token:?}");
    }
}

fn pattern(rule: &Rule, calls: usize) -> String {
    (0..calls).map(|_| if rule.fires().is_some() { 'x' } else { '.' }).collect()
}

#[test]
fn qualifiers_combine() {
    for (line, wanted) in [
        ("* hang", "xxxxxx"),
        ("* hang after 2", "..xxxx"),
        ("* hang times 2", "xx...."),
        ("* hang after 1 times 2", ".xx..."),
        ("* hang times 0", "......"),
        ("* hang probability 0", "......"),
        ("* hang probability 1 after 5", ".....x"),
    ] {
        assert_eq!(pattern(&rules(line).0[0], 6), wanted, "{line}");
    }
}

#[test]
fn chance_repeats_with_its_seed() {
    let run = |seed: u64| pattern(&rules(&format!("seed {seed}\n* hang probability 0.1")).0[0], 10_000);
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
    let fired = run(1).matches('x').count();
    assert!((800..1200).contains(&fired), "{fired}");
    // `times` counts what fired.
    assert_eq!(pattern(&rules("* hang probability 0.1 times 3").0[0], 10_000).matches('x').count(), 3);
}

#[test]
fn counters_belong_to_the_line() {
    let first = rules("* hang times 2\nC_Login hang times 1\n* hang times 2");
    assert_eq!(pattern(&first.0[0], 1), "x");
    let second = Rules::parse("C_Login hang times 3\n* hang times 2\n* hang times 2\n", &first).unwrap();
    assert_eq!(pattern(&second.0[0], 4), "xxx.", "another line");
    assert_eq!(pattern(&second.0[1], 3), "x..", "goes on");
    assert_eq!(pattern(&second.0[2], 3), "xx.", "the second of two that are alike");
    assert!(second.contains(&first.0[0]) && !second.contains(&first.0[1]));
    let without = Rules::parse("", &second).unwrap();
    let third = Rules::parse("* hang times 2", &without).unwrap();
    assert_eq!(pattern(&third.0[0], 3), "xx.", "a line that was away begins anew");
}
